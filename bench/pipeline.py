"""How close the whole way, from queued task to committed bag, comes to the bare encoder.

Starts the embedded service, posts copies of one series under new UIDs, and in between times the bare
encoder on ready tensors, so that both see the same machine. Prints a table, and as its last line JSON.
KEYSLICE_ENCODER and KEYSLICE_MODE choose another encoder, or another way of running it.

    python bench/pipeline.py [SERIES]    a directory, or a tar of DICOM; default: lidc-idri-0314 of
                                         ../shared/data where it is, else a 275-slice phantom
"""

import json
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import httpx
import numpy as np
import psutil
import pydicom
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, generate_uid
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.ct.phantom import Identity, chest, write_series
from models.ct.slices import prepare_slice
from models.load import Encoder, load_encoder
from models.modes import in_mode
from models.zoo import ENCODERS
from service.embedded import Running, in_background
from service.settings import Settings

ROUNDS = 3
COMPRESSED_SLICES = 100  # compressing them takes longer than embedding them
DEFAULT_SERIES = Path(__file__).resolve().parents[2] / "shared/data/lidc-idri-0314/lidc-idri-0314.tar.xz"
MB = 2**20

console = Console(width=100)


class PeakMemory:
    """Largest resident size of the API and of the worker with its decoding processes, sampled."""

    def __init__(self, service: Running) -> None:
        self.api = self.worker = 0
        children = psutil.Process(service.process.pid).children()
        self._api = next(each for each in children if "uvicorn" in each.cmdline())
        self._worker = next(each for each in children if "celery" in each.cmdline())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.1):  # more often would cost what is measured
            self.api = max(self.api, self._api.memory_info().rss)
            family = [self._worker, *self._worker.children()]
            self.worker = max(self.worker, sum(each.memory_info().rss for each in family))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name, in_background(Path(name) / "data") as service:
        folder, settings = Path(name), Settings(data_dir=Path(name) / "data")
        weights = settings.weights_path  # where the service has just measured how to run its encoder
        encoder = load_encoder(in_mode(ENCODERS[settings.encoder], settings.mode, weights), weights)
        files = series_files(folder)
        inputs = {
            "uncompressed": files,
            "JPEG-LS": compressed(files[:COMPRESSED_SLICES], folder / "jls", JPEGLSLossless, "pyjpegls"),
            "JPEG 2000": compressed(files[:COMPRESSED_SLICES], folder / "j2k", JPEG2000Lossless, "pylibjpeg"),
        }
        tensors, prepare_seconds = ready_tensors(encoder, inputs)
        memory = PeakMemory(service)
        bare: list[float] = []
        rates: dict[str, list[float]] = {name: [] for name in inputs}
        end_to_end(service, files[:8], folder)  # the first series after a start warms everything
        bare_encoder(encoder, tensors[:32])
        for _ in track(range(ROUNDS), "rounds", console=console):
            for each, paths in inputs.items():
                bare.append(bare_encoder(encoder, tensors))
                rates[each].append(end_to_end(service, paths, folder))
        bare.append(bare_encoder(encoder, tensors))
        memory.stop()
        figures = {each: statistics.median(found) for each, found in rates.items()}
        report(encoder, statistics.median(bare), figures, prepare_seconds, memory)


def series_files(folder: Path) -> list[Path]:
    """The files of the series asked for."""
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_SERIES
    if source.is_dir():
        return sorted(path for path in source.rglob("*") if path.is_file())
    if source.is_file():
        with tarfile.open(source) as archive:
            archive.extractall(folder / "series", filter="data")
        return sorted(path for path in (folder / "series").rglob("*") if path.is_file())
    phantom = chest(seed=0, lesion=False, slices=275, size=512)
    return write_series(folder / "series", phantom.hu, phantom.spacing_mm, Identity("BENCH"))


def compressed(files: list[Path], folder: Path, syntax: str, plugin: str) -> list[Path]:
    folder.mkdir()
    for path in track(files, folder.name, console=console):
        dataset = pydicom.dcmread(path)
        dataset.compress(syntax, encoding_plugin=plugin)
        dataset.save_as(folder / path.name)
    return sorted(folder.iterdir())


def ready_tensors(encoder: Encoder, inputs: dict[str, list[Path]]) -> tuple[np.ndarray, dict[str, float]]:
    """Encoder input of the uncompressed slices, and the seconds of one core that preparing a slice takes."""
    spec = encoder.spec
    tensors = np.empty((len(inputs["uncompressed"]), *spec.input_shape), np.float32)
    seconds = {}
    for each, paths in inputs.items():
        begun = time.thread_time()
        for path, out in zip(paths, tensors, strict=False):
            prepare_slice(path, out, spec.windows, spec.input_size)
        seconds[each] = (time.thread_time() - begun) / len(paths)
    return tensors, seconds


def bare_encoder(encoder: Encoder, tensors: np.ndarray) -> float:
    """Slices per second of the network alone, in the batches that the worker uses."""
    whole = len(tensors) // encoder.batch * encoder.batch
    start = time.perf_counter()
    for first in range(0, whole, encoder.batch):
        encoder.begin(tensors[first : first + encoder.batch])()
    return whole / (time.perf_counter() - start)


def end_to_end(service: Running, files: list[Path], folder: Path) -> float:
    """Slices per second from the queued task to the committed bag, of a copy of the series under new UIDs."""
    with httpx.Client(base_url=service.address, timeout=600) as http, copy_of(files, folder) as archive:
        with archive.open("rb") as body:
            answer = http.post("/v1/series", files={"files": body}).raise_for_status().json()
        queued = time.time()
        (series,) = answer["series"]
        path = f"/v1/series/{series['series_uid']}"
        while http.get(path).json()["state"] != "indexed":
            time.sleep(0.5)
        (embedding,) = http.get(path).json()["embeddings"]
        receipt = http.get(f"{path}/embeddings").json()["receipt"]
    # The worker may have begun before our own answer arrived.
    begun = min(queued, datetime.fromisoformat(receipt["started_at"]).timestamp())
    return float(embedding["slices"] / (datetime.fromisoformat(embedding["embedded_at"]).timestamp() - begun))


@contextmanager
def copy_of(files: list[Path], folder: Path) -> Iterator[Path]:
    """An uncompressed tar of the files as another series of another study."""
    study_uid, series_uid = generate_uid(), generate_uid()
    archive = folder / f"{series_uid}.tar"
    with tarfile.open(archive, "w") as tar:
        for number, path in enumerate(files):
            dataset = pydicom.dcmread(path)
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            dataset.save_as(folder / "slice.dcm")
            tar.add(folder / "slice.dcm", f"{number}.dcm")
    yield archive
    archive.unlink()


def report(
    encoder: Encoder, bare: float, rates: dict[str, float], prepare_seconds: dict[str, float], memory: PeakMemory
) -> None:
    spec, cores = encoder.spec, psutil.cpu_count(logical=False) or 1
    table = Table(
        "input",
        "slices/s",
        "of bare",
        "of bare at most",
        "prepare, core ms/slice",
        title=(f"{spec.name}, {spec.runtime} {spec.precision}, bare {bare:.1f} slices/s; medians of {ROUNDS} rounds"),
    )
    for each, rate in rates.items():
        # Preparing a slice and encoding it share the cores, on a CPU: more than all of their time there is not.
        most = 1 / (1 + bare * prepare_seconds[each] / cores) if encoder.device.type == "cpu" else 1.0
        table.add_row(each, f"{rate:.1f}", f"{rate / bare:.3f}", f"{most:.3f}", f"{prepare_seconds[each] * 1000:.1f}")
    console.print(table)
    console.print(f"API, peak {memory.api / MB:.0f} MB; worker with its decoders, peak {memory.worker / MB:.0f} MB")
    figures = {
        "end_to_end_over_bare": round(rates["uncompressed"] / bare, 4),
        "end_to_end_over_bare_jpegls": round(rates["JPEG-LS"] / bare, 4),
        "end_to_end_over_bare_jpeg2000": round(rates["JPEG 2000"] / bare, 4),
        "slices_per_s": round(rates["uncompressed"], 2),
        "bare_slices_per_s": round(bare, 2),
        "api_peak_mb": round(memory.api / MB, 1),
        "worker_peak_mb": round(memory.worker / MB, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
