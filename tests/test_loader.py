"""Bags read as they are needed."""

import tracemalloc

import numpy as np

from models.heads.loader import Bags

SHAPE = (100, 2, 64)  # slices, windows, dim
BAG_BYTES = 2 * np.prod(SHAPE)


def peak_bytes(count: int, keep_bags: int) -> int:
    """The most that numpy held at once while every bag was read twice."""
    tracemalloc.start()
    bags = Bags([lambda: np.ones(SHAPE, np.float16)] * count, keep_bytes=int(keep_bags * BAG_BYTES))
    for _ in range(2):
        for _ in bags.read(bags.chunks(np.arange(count))):
            pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_bags():
    few, many = peak_bytes(200, keep_bags=10), peak_bytes(2000, keep_bags=10)

    assert many - few < 0.01 * 1800 * BAG_BYTES  # what is noted of a bag, not the bag


def test_bags_that_are_kept_are_seen_to_grow():
    assert peak_bytes(400, keep_bags=400) - peak_bytes(200, keep_bags=10) > 300 * BAG_BYTES
