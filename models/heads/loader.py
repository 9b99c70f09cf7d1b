"""Bags for training, read as they are needed: memory is bounded whatever the number of patients."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KEEP_BYTES = 512 * 2**20  # of bags kept in memory; the rest is read anew in every epoch
CHUNK_INSTANCES = 16_384  # padded instances that go through a network at once


class NotABag(Exception):
    """What a store gave is no bag of this encoder, or holds NaN or infinity."""


class Bags:
    """Bags as (N, D) float16 tensors, instances in the order slice, window."""

    def __init__(self, loads: Sequence[Callable[[], NDArray[np.float16]]], keep_bytes: int | None = None) -> None:
        """Reads every bag once, keeps the first `keep_bytes` of them, KEEP_BYTES by default. Raises NotABag."""
        self._loads = loads
        self._kept: dict[int, Tensor] = {}
        self.shapes: list[tuple[int, int, int]] = []  # (slices, windows, dim)
        room = KEEP_BYTES if keep_bytes is None else keep_bytes
        for row, load in enumerate(loads):
            bag = load()
            self._check(row, bag)
            self.shapes.append((bag.shape[0], bag.shape[1], bag.shape[2]))
            room -= bag.nbytes
            if room >= 0:
                self._kept[row] = torch.from_numpy(np.array(bag)).flatten(0, 1)

    @property
    def dim(self) -> int:
        return self.shapes[0][2]

    @property
    def windows(self) -> int:
        return self.shapes[0][1]

    def instances(self, row: int) -> int:
        return self.shapes[row][0] * self.shapes[row][1]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, row: int) -> Tensor:
        """(N, D) float16."""
        if row in self._kept:
            return self._kept[row]
        return torch.from_numpy(np.array(self._loads[row]())).flatten(0, 1)

    def chunks(self, rows: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """The rows in parts whose padded bags hold at most CHUNK_INSTANCES; bags of like length together."""
        order = sorted((int(row) for row in rows), key=self.instances, reverse=True)
        parts: list[list[int]] = []
        for row in order:  # the first of a part is its longest
            if not parts or (len(parts[-1]) + 1) * self.instances(parts[-1][0]) > CHUNK_INSTANCES:
                parts.append([])
            parts[-1].append(row)
        return [np.array(part, dtype=np.int64) for part in parts]

    def read(self, parts: Iterable[NDArray[np.int64]]) -> Iterator[tuple[NDArray[np.int64], Tensor, Tensor]]:
        """(rows, padded bags, which instances are real) of each part, read one ahead of the network."""
        with ThreadPoolExecutor(1) as pool:
            ahead = None
            for part in parts:
                following = pool.submit(self._padded, part)
                if ahead is not None:
                    yield ahead.result()
                ahead = following
            if ahead is not None:
                yield ahead.result()

    def _padded(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, Tensor]:
        return rows, *pad([self[int(row)] for row in rows])

    def _check(self, row: int, bag: NDArray[Any]) -> None:
        expected = f"(slices, {self.windows}, {self.dim})" if self.shapes else "(slices, windows, dim)"
        if bag.ndim != 3 or 0 in bag.shape or (self.shapes and bag.shape[1:] != self.shapes[0][1:]):
            raise NotABag(f"bag {row} is of shape {bag.shape}, expected {expected}")
        if not np.isfinite(bag).all():
            raise NotABag(f"bag {row} holds NaN or infinity")


def pad(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags of (N_b, D) -> (B, max N, D) float32 with zeros behind, and which instances are real (B, max N)."""
    longest = max(len(bag) for bag in bags)
    padded = torch.zeros(len(bags), longest, bags[0].shape[1])
    present = torch.zeros(len(bags), longest, dtype=torch.bool)
    for row, bag in enumerate(bags):
        padded[row, : len(bag)] = bag
        present[row, : len(bag)] = True
    return padded, present
