"""Decoded slices in one file that all processes of a machine read."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from models.ct.series import CTSlice

LAYOUT = 1  # of the file; a change makes other names
STORED = np.dtype("<i2")
HEADER_BYTES = 128  # of a .npy of one dimension

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HUCache:
    """The HU of these slices, as `fill_cache` has written them.

    It holds a path and no open file, so that a worker gets it for nothing; the pixels lie in the system's page cache
    once, however many workers read them.
    """

    path: Path
    shapes: tuple[tuple[int, int], ...]  # rows, columns
    starts: tuple[int, ...]  # of each slice in the flat array, and of what follows the last

    def decoded(self) -> NDArray[np.bool_]:
        """(slices,): which of them could be decoded."""
        return self._read(self.starts[-1], len(self.shapes)).astype(np.bool_)

    def __getitem__(self, index: int) -> NDArray[np.int16]:
        """(rows, columns), the caller's own."""
        rows, columns = self.shapes[index]
        return self._read(self.starts[index], rows * columns).reshape(rows, columns)

    def _read(self, start: int, count: int) -> NDArray[np.int16]:
        # Not mapped: a map is made and paged in anew for each slice, which takes four times as long, and a disk that
        # fails then ends the process instead of raising OSError.
        return np.fromfile(self.path, STORED, count, offset=HEADER_BYTES + STORED.itemsize * start)


def cache_of(slices: Sequence[CTSlice], folder: Path) -> HUCache:
    """Where the HU of these slices are or will be. Another slice, size, rescale or file size makes another file."""
    facts = [f"{e.sop_uid} {e.rows} {e.columns} {e.slope} {e.intercept} {e.path.stat().st_size}" for e in slices]
    digest = hashlib.sha256("\n".join([str(LAYOUT), *facts]).encode()).hexdigest()[:16]
    shapes = tuple((each.rows, each.columns) for each in slices)
    starts = np.cumsum([0, *(rows * columns for rows, columns in shapes)])
    return HUCache(folder / f"{digest}.npy", shapes, tuple(starts.tolist()))


def fill_cache(cache: HUCache, decoded: Iterable[NDArray[np.int16] | None]) -> None:
    """Write the slices, None where one could not be decoded, unless the file is there.

    The file is one flat int16 array: each slice's pixels by rows, then a 1 or 0 per slice, whether it was decoded. It
    is written under a temporary name and renamed; of several processes that come at once, one writes. On a full disk
    OSError is raised and nothing is left.
    """
    cache.path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.path.with_suffix(".lock")):
        if cache.path.exists():
            return
        partial = cache.path.with_suffix(".part")
        log.info("decoding %d slices into %s", len(cache.shapes), cache.path.name)
        try:
            with partial.open("wb") as file:
                _write(file, cache, decoded)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        partial.replace(cache.path)


def _write(file: BinaryIO, cache: HUCache, decoded: Iterable[NDArray[np.int16] | None]) -> None:
    length = cache.starts[-1] + len(cache.shapes)
    np.lib.format.write_array_header_1_0(file, {"descr": STORED.str, "fortran_order": False, "shape": (length,)})
    assert file.tell() == HEADER_BYTES
    there = []
    for shape, hu in zip(cache.shapes, decoded, strict=True):
        there.append(hu is not None)
        file.write((np.zeros(shape, STORED) if hu is None else hu.astype(STORED, copy=False)).tobytes())
    file.write(np.array(there, STORED).tobytes())
    file.flush()
    os.fsync(file.fileno())
