"""How fast an export's headers are scanned, in how much memory, and what a kill in the middle costs.

Writes a synthetic export below a temporary directory: the header of a real CT, which pydicom brings along, with other
identities and positions, and pixels that take no room on the disk. Scans it as a worker does, into a catalog, beside a
loop of pydicom.dcmread(stop_before_pixels=True) over some of the same files in the same run; scans a tenth of it, to
see whether memory grows. Then embeds some series twice, once undisturbed, and once by a service that is killed in the
middle, all its processes by SIGKILL, and started again. What that costs does not depend on how much there is to embed,
so it is told as a share of the whole export at the rate that was measured. Prints a table, and as its last line JSON.

    python bench/export.py [--files 100000] [--series 2000] [--embed 4000]
"""

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
import pydicom
from pydicom.data import get_testdata_file
from rich.console import Console
from rich.table import Table

from bench.memory import MB
from models.ct.phantom import Identity, ct_slice
from service.embedded import Running, in_background
from service.queue import Queue
from service.settings import Settings
from service.storage.stores import open_stores
from workers.exports import run_export

SIZE = 512  # pixels of a row and a column
SPACING = (5.0, 0.7, 0.7)  # mm
SCANNER = get_testdata_file("CT_small.dcm", download=False)  # 256 elements, half of them private, of a GE HiSpeed
# (7FE0,0010) OW and its length (PS3.5 7.1.2), behind which a hole in the file reads as zeros.
PIXELS = b"\xe0\x7f\x10\x00OW\x00\x00" + (SIZE * SIZE * 2).to_bytes(4, "little")
UID, Z = b"1." + 62 * b"9", b"-99999.999999999"  # as long as a UI and a DS may be
SAMPLE = 5000  # files that pydicom's loop reads, before and after the scan
SMALLER = 10  # times less, for the second measure of memory

console = Console(width=100)


@dataclass(frozen=True)
class Scan:
    files: int
    seconds: float
    peak_mb: float  # proportional resident size of the process and its children


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--series", type=int, default=2_000)
    parser.add_argument("--embed", type=int, default=4_000, help="files that are embedded, twice")
    parser.add_argument("--scan", type=Path, nargs=2, metavar=("EXPORT", "DATA"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.scan:
        print(json.dumps(scan(*asked.scan)))
        return
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name:
        folder = Path(name)
        with console.status("write the export"):
            whole, tenth, some = folder / "whole", folder / "tenth", folder / "some"
            write_export(whole, asked.files, asked.series)
            write_export(tenth, asked.files // SMALLER, max(1, asked.series // SMALLER))
            write_export(some, asked.embed, max(1, asked.embed * asked.series // asked.files))
        with console.status("scan"):
            sample = random.Random(0).sample(sorted(whole.rglob("IM*")), min(SAMPLE, asked.files))
            plain = [pydicom_rate(sample)]
            large = scan_apart(whole, folder / "data-whole")
            plain.append(pydicom_rate(sample))
            small = scan_apart(tenth, folder / "data-tenth")
        with console.status("embed undisturbed"):
            undisturbed = embed(some, folder / "data-undisturbed", killed=False)
        with console.status("embed, killed in the middle"):
            disturbed = embed(some, folder / "data-killed", killed=True)
    report(asked.files, asked.embed, statistics.mean(plain), large, small, undisturbed, disturbed)


def write_export(root: Path, files: int, series: int) -> None:
    """So many files of so many series, each series in a folder of its study, as media of a PACS have them."""
    for number in range(series):
        identity = Identity(f"EXPORT-{number:05d}")
        header = _header(identity)
        folder = root / f"PA{number // 100:03d}" / f"ST{number:05d}" / "SE1"
        folder.mkdir(parents=True)
        for slice_number in range(files * number // series, files * (number + 1) // series):
            uid = identity.uid("slice", str(slice_number)).encode().ljust(len(UID), b"\0")
            z = f"{slice_number * SPACING[0]:<{len(Z)}}".encode()
            with (folder / f"IM{slice_number:06d}").open("wb") as file:
                file.write(header.replace(UID, uid).replace(Z, z))
                file.truncate(file.tell() + SIZE * SIZE * 2)


def _header(identity: Identity) -> bytes:
    """Of a slice of the series, up to the value of its pixels, with UID and Z where its own come."""
    ours = ct_slice(np.zeros((1, 1), dtype=np.float32), 0.0, 0, SPACING, identity)
    ours.Rows = ours.Columns = SIZE
    ours.SOPInstanceUID = ours.file_meta.MediaStorageSOPInstanceUID = UID.decode()
    ours.ImagePositionPatient = ["-180.0", "-180.0", Z.decode()]
    del ours.PixelData
    dataset = pydicom.dcmread(SCANNER, stop_before_pixels=True)
    dataset.update(ours)
    dataset.file_meta = ours.file_meta
    header = io.BytesIO()
    dataset.save_as(header, enforce_file_format=True)
    return header.getvalue() + PIXELS


def pydicom_rate(files: list[Path]) -> float:
    """Headers per second of the plain loop, in this one process."""
    started = time.perf_counter()
    for path in files:
        pydicom.dcmread(path, stop_before_pixels=True)
    return len(files) / (time.perf_counter() - started)


def scan(root: Path, data_dir: Path) -> dict[str, float]:
    """A dry run of the export, in this process and those that it starts."""
    settings = Settings(data_dir=data_dir)
    stores = open_stores(settings)
    queue = Queue(settings, stores)
    row, _ = stores.exports.add(root.resolve().as_uri(), settings.encoder, {"dry_run": True})
    started = time.perf_counter()
    run_export(row.export_id, stores, settings, queue)
    seconds = time.perf_counter() - started
    ended = stores.exports.get(row.export_id)
    if ended.state != "done":
        raise SystemExit(f"the scan ended as {ended.state}: {ended.error}")
    files, _, _ = stores.contents.totals(row.export_id)
    queue.close()
    stores.close()
    return {"files": files, "seconds": seconds}


def scan_apart(root: Path, data_dir: Path) -> Scan:
    """The same in a process of its own, watched."""
    command = [sys.executable, __file__, "--scan", str(root), str(data_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak, watched = 0, psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, sum(_size(each) for each in [watched, *_children(watched)]))
        time.sleep(0.1)
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit("the scan failed")
    return Scan(**json.loads(output.splitlines()[-1]), peak_mb=peak / MB)


def embed(root: Path, data_dir: Path, *, killed: bool) -> float:
    """Seconds from the export's request to its end; killed when half of its series are embedded, and taken up again."""
    with _service(root, data_dir) as running:
        started = time.perf_counter()
        export_id = _post(running, root)
        _wait(running, export_id, share=0.5 if killed else 1.0)
        if not killed:
            return time.perf_counter() - started
        family = [psutil.Process(running.process.pid), *_children(psutil.Process(running.process.pid))]
        for each in family:
            each.kill()
        psutil.wait_procs(family)
    with _service(root, data_dir) as running:
        if _post(running, root) != export_id:
            raise SystemExit("the export began anew, expected it to go on where it was")
        _wait(running, export_id, share=1.0)
        return time.perf_counter() - started


def _service(root: Path, data_dir: Path) -> AbstractContextManager[Running]:
    """One that may read the export; both measure how to run their encoder in one directory, and so once."""
    weights = os.environ.get("KEYSLICE_WEIGHTS_DIR", str(data_dir.parent / "weights"))
    return in_background(data_dir, KEYSLICE_EXPORT_ROOTS=str(root), KEYSLICE_WEIGHTS_DIR=weights)


def _post(running: Running, root: Path) -> str:
    answer = httpx.post(f"{running.address}/v1/exports", json={"uri": root.resolve().as_uri()}, timeout=60)
    return str(answer.raise_for_status().json()["export_id"])


def _wait(running: Running, export_id: str, share: float) -> None:
    """Until this share of its series is embedded, or until its end."""
    while True:
        export = httpx.get(f"{running.address}/v1/exports/{export_id}", params={"limit": 1}, timeout=60).json()
        states = export["states"]
        if export["state"] in ("failed", "cancelled") or states.get("failed"):
            raise SystemExit(f"the export ended as {export['state']}: {export['error']}")
        if export["state"] == "done" or (share < 1.0 and states.get("embedded", 0) > share * sum(states.values())):
            return
        time.sleep(0.2)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _size(process: psutil.Process) -> int:
    """Proportional resident size, in which pages that processes share count once; plain where there is none."""
    try:
        found = process.memory_full_info()
        return int(getattr(found, "pss", found.rss))
    except psutil.Error:
        return 0


def report(
    files: int, embedded: int, plain: float, large: Scan, small: Scan, undisturbed: float, disturbed: float
) -> None:
    rate, lost, whole = large.files / large.seconds, disturbed - undisturbed, files * undisturbed / embedded
    table = Table("", "", title=f"an export of {files} files, header and empty pixels; {os.cpu_count()} cores")
    table.add_row("pydicom.dcmread(stop_before_pixels=True), files/s", f"{plain:.0f}")
    table.add_row("scan into the catalog, files/s", f"{rate:.0f}")
    table.add_row("scan over pydicom", f"{rate / plain:.2f}")
    table.add_row(f"peak memory of the scan with its processes, {large.files} files", f"{large.peak_mb:.0f} MB")
    table.add_row(f"the same, {small.files} files", f"{small.peak_mb:.0f} MB")
    table.add_row(f"scan and embed {embedded} files", f"{undisturbed:.1f} s")
    table.add_row("the same, all processes killed in the middle and started again", f"{disturbed:.1f} s")
    table.add_row(f"lost, of the {whole:.0f} s that {files} files take at this rate", f"{lost / whole:.1%}")
    console.print(table)
    figures = {
        "scan_over_pydicom": round(rate / plain, 3),
        "peak_mb": round(large.peak_mb, 1),
        "resume_loss": round(lost / whole, 4),
        "scan_files_per_s": round(rate, 1),
        "peak_mb_tenth": round(small.peak_mb, 1),
        "lost_s": round(lost, 1),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
