"""Directories for what is on its way: an upload, files out of a bucket. They go when the work ends, or the process."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

PREFIX = "upload-"
YOUNG_SECONDS = 5.0  # between a directory and its lock
ABANDONED_SECONDS = 120.0  # nobody waits so long for a search by a picture


@contextmanager
def staging(root: Path) -> Iterator[Path]:
    """A directory for one request, gone at its end whatever happens. A lock on it says that the request lives."""
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=root, prefix=PREFIX, ignore_cleanup_errors=True) as folder, _locked(Path(folder)):
        yield Path(folder)


def remove_abandoned(root: Path) -> None:
    """Remove what requests whose process was killed have left."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):  # gone by itself, or locked: its request lives
            if age_seconds(folder) > YOUNG_SECONDS:
                with _locked(folder):
                    rmtree(folder, ignore_errors=True)
    for path in (root / "queries").glob("*"):
        with suppress(OSError):
            if age_seconds(path) > ABANDONED_SECONDS:
                path.unlink()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock goes with the process. Raises OSError where another one has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def age_seconds(path: Path) -> float:
    """Since it was last written; of what is gone nothing."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0
