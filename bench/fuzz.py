"""What becomes of spoiled DICOM files: each must be refused with a reason or read, in bounded time and memory.

Takes real files, spoils them by a random generator that is seeded per file (bench/mutations.py), and puts each through
what it meets in the service: the screening of the intake, then a worker's decoding process. Prints tables, and as its
last line JSON. Whatever takes down its process is kept in --keep.

    python bench/fuzz.py [--files 20000] [--seed 0] [--data ../shared/data] [--keep FOLDER]
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.memory import peak_mb
from bench.mutations import MUTATIONS, Original, spliced
from models.ct.processes import Processes, Slots
from models.ct.screening import Frames, SetAside, screened_header, screened_headers
from models.ct.slices import prepare_slice
from models.ct.windows import ABDOMEN, LUNG
from service.about import about_series

DATA = Path(__file__).resolve().parents[2] / "shared/data"
HANG_SECONDS = 5.0
MB_AT_MOST = 1000  # of a decoding process
FRAMES = 4  # of a multi-frame file
SLOW_SECONDS = 1.0
UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")
SHOWN = 20  # errors
PROCESSES = 2
SHARE = 8  # files that a process takes at once, as a worker hands them out
PER_ARCHIVE = 4  # slices of a series, which are much alike
WINDOWS, SIZE = (ABDOMEN, LUNG), 224
DIED = "its decoder died"  # models/ct/processes.py says so of a file that took down two processes

console = Console(width=110)


@dataclass
class Outcome:
    """What became of the files."""

    files: int = 0
    usable: int = 0
    set_aside: Counter[str] = field(default_factory=Counter)
    by_mutation: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    errors: list[str] = field(default_factory=list)  # neither read nor refused
    crashes_of_decoders: int = 0  # files that took down the process that tried them, twice
    slowest_s: float = 0.0
    slowest: str = ""
    peak_mb: float = 0.0

    def add(self, name: str, answer: "Examined | SetAside | Exception") -> None:
        self.files += 1
        said: Any = answer
        if isinstance(answer, Examined):
            said = answer.said
            self.peak_mb = max(self.peak_mb, answer.peak_mb)
            if answer.seconds > self.slowest_s:
                self.slowest_s, self.slowest = answer.seconds, name
        what = "usable"
        if isinstance(said, SetAside):
            what = str(said.reason)
            self.set_aside[what] += 1
            self.crashes_of_decoders += said.detail.startswith(DIED)
        elif isinstance(said, Exception):
            what = "error"
            self.errors.append(f"{name}: {said}")
        else:
            self.usable += 1
        self.by_mutation[name.split("-")[1]][what] += 1


@dataclass(frozen=True)
class Examined:
    """What the intake and a decoding process said of a file."""

    said: Any
    seconds: float
    peak_mb: float  # of the process, so far


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--files", type=int, default=20_000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--data", type=Path, default=DATA)
    options.add_argument("--keep", type=Path, help="where files that took down a process, or were slow, are put")
    asked = options.parse_args()
    if not asked.data.is_dir():
        sys.exit(f"no real CT at {asked.data}")
    originals = read_originals(asked.data)
    console.print(f"{len(originals)} real files, seed {asked.seed}")
    started = time.perf_counter()
    outcome = fuzz(originals, asked.files, asked.seed, asked.keep, progress=True)
    report(outcome, time.perf_counter() - started)


def read_originals(data: Path) -> list[Original]:
    """Every odd file, and some slices of every series."""
    odd = [path for path in sorted((data / "oddities").rglob("*")) if path.is_file()]
    found = [Original(path.name, _with_uids(path.read_bytes())) for path in odd]
    for path in sorted(data.glob("*/*.tar.xz")):
        with tarfile.open(path) as archive:
            members = (each for each in archive if each.isfile() and each.name.endswith(".dcm"))
            for member in islice(members, PER_ARCHIVE):
                found.append(Original(member.name, archive.extractfile(member).read()))  # type: ignore[union-attr]
    return found


def spoil(originals: Sequence[Original], seed: int, number: int) -> tuple[str, bytes]:
    """The number-th spoiled file: what was done to it, and its bytes. The same for the same seed, always."""
    random = np.random.default_rng([seed, number])
    original = originals[random.integers(len(originals))]
    name = str(random.choice([*MUTATIONS, "spliced"]))
    if name == "spliced":
        return name, spliced(original, random, originals[random.integers(len(originals))])
    return name, MUTATIONS[name](original, random)


def examine(path: Path, out: NDArray[np.float32]) -> Examined:
    """Put a file through what it meets: the intake's reading, then a decoding process's."""
    started = time.perf_counter()
    said: Any = screened_header(path)
    if not isinstance(said, SetAside):
        about_series(path)
        screened_headers(path)
        said = prepare_slice(path, out, WINDOWS, SIZE)
    if isinstance(said, Frames):
        every = [prepare_slice((path, number), out, WINDOWS, SIZE) for number in range(1, min(said.count, FRAMES) + 1)]
        said = next((each for each in every if isinstance(each, SetAside)), said)
    return Examined(said, time.perf_counter() - started, peak_mb())


def fuzz(originals: Sequence[Original], files: int, seed: int, keep: Path | None, progress: bool = False) -> Outcome:
    """Spoil so many files, and put each through the intake and a decoding process."""
    outcome = Outcome()
    slots = Slots(SHARE * PROCESSES, (len(WINDOWS), SIZE, SIZE))
    processes = Processes(PROCESSES, examine, slots, HANG_SECONDS)
    waiting: list[tuple[list[Path], Future[list[Any]]]] = []
    with tempfile.TemporaryDirectory(prefix="keyslice-fuzz-") as folder:
        shares = _shares(originals, files, seed, Path(folder))
        total = -(-files // SHARE)
        for number, share in enumerate(track(shares, "files", total, console=console, disable=not progress)):
            if len(waiting) == PROCESSES:  # the slots of the first of them are taken again
                _collect(outcome, *waiting.pop(0), keep)
            slot = number % PROCESSES * SHARE
            waiting.append((share, processes.submit([(path, slot + k) for k, path in enumerate(share)])))
        for each in waiting:
            _collect(outcome, *each, keep)
        processes.close()
    return outcome


def report(outcome: Outcome, seconds: float) -> None:
    reasons = [reason for reason, _ in outcome.set_aside.most_common()]
    by_reason = Table("reason", "files", title="set aside")
    for reason in reasons:
        by_reason.add_row(reason, str(outcome.set_aside[reason]))
    by_mutation = Table("what was done", "files", "usable", "set aside", "error", title="by mutation")
    for name, found in sorted(outcome.by_mutation.items()):
        refused = found.total() - found["usable"] - found["error"]
        by_mutation.add_row(name, *(str(each) for each in (found.total(), found["usable"], refused, found["error"])))
    console.print(by_mutation, by_reason)
    for error in outcome.errors[:SHOWN]:
        console.print(error, style="red")
    console.print(f"{seconds:.0f} s; the slowest file: {outcome.slowest}")
    figures = {
        "files": outcome.files,
        "usable": outcome.usable,
        "set_aside": dict(outcome.set_aside.most_common()),
        "errors": len(outcome.errors),
        "crashes_of_decoders": outcome.crashes_of_decoders,
        "slowest_s": round(outcome.slowest_s, 2),
        "peak_mb": round(outcome.peak_mb),
    }
    print(json.dumps(figures))


def _with_uids(content: bytes) -> bytes:
    """A CT slice whose UIDs were taken away gets some, lest none of its mutations meets a decoder."""
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    missing = [keyword for keyword in UIDS if not dataset.get(keyword)]
    if dataset.get("Modality") != "CT" or not missing:
        return content
    for keyword in missing:
        setattr(dataset, keyword, "1.2.3")
    stream = io.BytesIO()
    dataset.save_as(stream)
    return stream.getvalue()


def _shares(originals: Sequence[Original], files: int, seed: int, folder: Path) -> Iterator[list[Path]]:
    for first in range(0, files, SHARE):
        share = []
        for number in range(first, min(first + SHARE, files)):
            mutation, content = spoil(originals, seed, number)
            path = folder / f"{number}-{mutation}"
            path.write_bytes(content)
            share.append(path)
        yield share


def _collect(outcome: Outcome, share: list[Path], said: Future[list[Any]], keep: Path | None) -> None:
    for path, answer in zip(share, said.result(), strict=True):
        outcome.add(path.name, answer)
        if keep and (not isinstance(answer, Examined) or answer.seconds > SLOW_SECONDS):
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep)
        path.unlink()


if __name__ == "__main__":
    main()
