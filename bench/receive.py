"""How many instances per second the C-STORE receiver takes, beside what the disk and the sender allow.

Starts `keyslice receive` on a directory of its own, and sends a real series with DCMTK's storescu: by one sender, then
by four at once, each under UIDs of its own. The same files are written and flushed plainly in the same run. Prints a
table, and as its last line JSON.

    python bench/receive.py [SERIES]     a tar of DICOM; default: lidc-idri-0001 of ../shared/data
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import psutil
import pydicom
from pydicom.uid import generate_uid
from rich.console import Console
from rich.table import Table

from models.durable import fsync_path

DEFAULT_SERIES = Path(__file__).resolve().parents[2] / "shared/data/lidc-idri-0001/lidc-idri-0001.tar.xz"
SENDERS = 4
console = Console(width=100)


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_SERIES
    storescu = _dcmtk("storescu")
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name:
        folder = Path(name)
        with tarfile.open(source) as archive:
            archive.extractall(folder / "series", filter="data")
        files = sorted(path for path in (folder / "series").rglob("*") if path.is_file())
        disk = plain_writes(files, folder)
        series = [copy_of(files, folder / f"copy-{number}") for number in range(1 + SENDERS)]
        port = _free_port()
        command = [sys.executable, "-P", "-m", "service.cli", "receive", "--port", str(port)]
        process = subprocess.Popen(command, env=os.environ | {"KEYSLICE_DATA_DIR": str(folder / "data")})
        try:
            _wait_for(port)
            one = sent(storescu, port, series[:1])
            busy = psutil.Process(process.pid).cpu_times()
            four = sent(storescu, port, series[1:])
            peak = psutil.Process(process.pid).memory_info().rss / 2**20
        finally:
            process.terminate()
            process.wait()
    report(disk, one, four, (busy.user + busy.system) / len(files), peak)


def plain_writes(files: list[Path], folder: Path) -> float:
    """Files per second that are written and flushed, with their directory's entry."""
    target = folder / "plain"
    target.mkdir()
    contents = [path.read_bytes() for path in files]
    started = time.perf_counter()
    for number, content in enumerate(contents):
        path = target / str(number)
        path.write_bytes(content)
        fsync_path(path)
        fsync_path(target)
    return len(files) / (time.perf_counter() - started)


def copy_of(files: list[Path], folder: Path) -> list[Path]:
    """The files as another series of another study."""
    folder.mkdir()
    study_uid, series_uid = generate_uid(), generate_uid()
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.save_as(folder / path.name)
    return sorted(folder.iterdir())


def sent(storescu: str, port: int, series: list[list[Path]]) -> float:
    """Instances per second, each series by a sender of its own."""
    started = time.perf_counter()
    commands = [[storescu, "-aec", "KEYSLICE", "127.0.0.1", str(port), *map(str, files)] for files in series]
    senders = [subprocess.Popen(command) for command in commands]
    if any(sender.wait() for sender in senders):
        raise SystemExit("a sender failed")
    return sum(map(len, series)) / (time.perf_counter() - started)


def report(disk: float, one: float, four: float, seconds: float, peak_mb: float) -> None:
    table = Table("", "instances/s", "of the disk")
    for name, rate in (("written and flushed plainly", disk), ("one sender", one), (f"{SENDERS} senders", four)):
        table.add_row(name, f"{rate:.1f}", f"{rate / disk:.2f}")
    console.print(table)
    console.print(f"{seconds * 1000:.0f} ms of a core per instance, its start included; {peak_mb:.0f} MB")
    figures = {"disk_per_s": disk, "one_sender_per_s": one, "four_senders_per_s": four, "memory_mb": peak_mb}
    print(json.dumps({name: round(value, 1) for name, value in figures.items()}))


def _dcmtk(tool: str) -> str:
    """DCMTK's, and not pynetdicom's, which lies beside our Python."""
    ours = Path(sys.executable).parent
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != ours)
    if not (found := shutil.which(tool, path=path)):
        raise SystemExit(f"no {tool} (Debian dcmtk)")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SystemExit("the receiver does not listen")


if __name__ == "__main__":
    main()
