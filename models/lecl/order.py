"""In which order a run sees the slices: a pure function of seed and step, so that resuming needs no state."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from models.lecl.config import BadConfig

Key = tuple[int, int]  # the slice's index, and how often it was drawn before


@dataclass(frozen=True)
class Order:
    """Every slice once per epoch, shuffled anew in each; a step's batch may reach into the next epoch.

    A step's slices are the same however many processes and parts compute them.
    """

    slices: int
    batch: int  # slices per step
    seed: int

    def keys(self, step: int) -> list[Key]:
        """The step's slices, `batch` of them."""
        first = step * self.batch
        keys: list[Key] = []
        while len(keys) < self.batch:
            epoch, within = divmod(first + len(keys), self.slices)
            rows = _shuffled(self.slices, self.seed, epoch)[within : within + self.batch - len(keys)]
            keys += [(int(row), epoch) for row in rows]
        return keys


class Parts(Sampler[list[Key]]):
    """What one process computes of the steps from `start` to `stop`: `accumulate` lists of keys per step.

    Raises BadConfig where the batch cannot be dealt evenly.
    """

    def __init__(self, order: Order, start: int, stop: int, accumulate: int = 1, rank: int = 0, processes: int = 1):
        if order.batch % (accumulate * processes):
            raise BadConfig(
                f"batch {order.batch}, expected a multiple of accumulate times processes, {accumulate} x {processes}"
            )
        self._order, self._steps = order, range(start, stop)
        self._accumulate, self._rank, self._processes = accumulate, rank, processes

    def __len__(self) -> int:
        return len(self._steps) * self._accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        size = self._order.batch // (self._accumulate * self._processes)
        for step in self._steps:
            keys = self._order.keys(step)
            for part in range(self._accumulate):
                first = (part * self._processes + self._rank) * size
                yield keys[first : first + size]


@lru_cache(maxsize=2)
def _shuffled(slices: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(slices)
