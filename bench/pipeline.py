"""How close the whole way, from queued task to committed bag, comes to the bare encoder.

Starts the embedded service, posts copies of one series under new UIDs, and in between times the bare
encoder on ready tensors, so that both see the same machine. Prints a table, and as its last line JSON.

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
from pydicom.uid import JPEG2000Lossless, generate_uid
from rich.console import Console
from rich.progress import track
from rich.table import Table

from models.ct.decode import read_hu
from models.ct.phantom import Identity, chest, write_series
from models.ct.series import read_series
from models.ct.slices import encoder_input
from models.load import BATCH_INSTANCES, Encoder, load_encoder
from models.zoo import DEFAULT_ENCODER, ENCODERS
from service.embedded import Running, in_background

ROUNDS = 3
JPEG2000_SLICES = 100  # encoding them takes longer than embedding them
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
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as folder:
        files = series_files(Path(folder))
        encoder = load_encoder(ENCODERS[DEFAULT_ENCODER], Path(folder))
        slices = read_series(files).slices
        tensors = np.stack(
            [
                encoder_input(read_hu(each.path), encoder.spec.windows, encoder.spec.input_size)
                for each in track(slices, "ready tensors", console=console)
            ]
        )
        jpeg2000 = compressed([each.path for each in slices[:JPEG2000_SLICES]], Path(folder) / "j2k")
        bare, plain, packed = [], [], []
        with in_background(Path(folder) / "data") as service:
            memory = PeakMemory(service)
            end_to_end(service, files[:8], Path(folder))  # the first series after a start warms everything
            bare_encoder(encoder, tensors[:32])
            for _ in track(range(ROUNDS), "rounds", console=console):
                bare.append(bare_encoder(encoder, tensors))
                plain.append(end_to_end(service, files, Path(folder)))
                packed.append(end_to_end(service, jpeg2000, Path(folder)))
            bare.append(bare_encoder(encoder, tensors))
            memory.stop()
        upload_mb = sum(file.stat().st_size for file in files) / MB
    report(statistics.median(bare), statistics.median(plain), statistics.median(packed), memory, len(slices), upload_mb)


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


def compressed(files: list[Path], folder: Path) -> list[Path]:
    folder.mkdir()
    for path in track(files, "JPEG 2000", console=console):
        dataset = pydicom.dcmread(path)
        dataset.compress(JPEG2000Lossless, encoding_plugin="pylibjpeg")
        dataset.save_as(folder / path.name)
    return sorted(folder.iterdir())


def bare_encoder(encoder: Encoder, tensors: np.ndarray) -> float:
    """Slices per second of the network alone, in the batches that the worker uses."""
    per_batch = BATCH_INSTANCES // len(encoder.spec.windows)
    start = time.perf_counter()
    for first in range(0, len(tensors), per_batch):
        encoder.encode(tensors[first : first + per_batch])
    return len(tensors) / (time.perf_counter() - start)


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


def report(bare: float, plain: float, packed: float, memory: PeakMemory, slices: int, upload_mb: float) -> None:
    table = Table("figure", "value", title=f"{slices} slices, {upload_mb:.0f} MB, medians of {ROUNDS} rounds")
    table.add_row("bare encoder", f"{bare:.1f} slices/s")
    table.add_row("end to end, uncompressed", f"{plain:.1f} slices/s, {plain / bare:.3f} of bare")
    table.add_row("end to end, JPEG 2000", f"{packed:.1f} slices/s, {packed / bare:.3f} of bare")
    table.add_row("API, peak", f"{memory.api / MB:.0f} MB")
    table.add_row("worker with its decoders, peak", f"{memory.worker / MB:.0f} MB")
    console.print(table)
    figures = {
        "end_to_end_over_bare": round(plain / bare, 4),
        "end_to_end_over_bare_jpeg2000": round(packed / bare, 4),
        "slices_per_s": round(plain, 2),
        "bare_slices_per_s": round(bare, 2),
        "api_peak_mb": round(memory.api / MB, 1),
        "worker_peak_mb": round(memory.worker / MB, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
