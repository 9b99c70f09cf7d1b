"""Embeddings of the measured slices, kept on disk so that a second run only reads them."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.bags import Bag
from bench.entries import SliceEncoder
from bench.patients import Series, Single
from models.ct.slices import encoder_input

BATCH = 16  # slices prepared at once

Floats = NDArray[np.float32]


class Embeddings:
    """Of one encoder. `noted(slices)` is called as slices are done, kept ones included."""

    def __init__(self, encoder: SliceEncoder, cache: Path, noted: Callable[[int], None]) -> None:
        self.encoder, self.noted = encoder, noted
        self._folder = cache / "embeddings" / encoder.id
        self._clean: dict[str, Floats] = {}

    def clean(self, series: Series) -> Floats:
        """(slices, windows, dim) of a series as it is."""
        if series.name not in self._clean:
            self._clean[series.name] = self._kept(f"clean-{series.name}", len(series.hu), lambda: series.hu)
        return self._clean[series.name]

    def singles(self, singles: Sequence[Single]) -> Floats:
        """(slices, windows, dim) of the slices without a series."""
        return self._kept("singles", len(singles), lambda: (each.hu for each in singles))

    def bags(self, plan: str, bags: Sequence[Bag], series: Series) -> list[Floats]:
        """(slices, windows, dim) of each bag of a series; only the slices that planting changed are embedded anew."""
        counts = [len(bag.changed) for bag in bags]
        planted = self._kept(
            plan, sum(counts), lambda: (hu for bag in bags if bag.planted is not None for hu in bag.planted)
        )
        answer = []
        for bag, changed in zip(bags, np.split(planted, np.cumsum(counts)[:-1]), strict=True):
            features = self.clean(series)[list(bag.slices)]
            features[list(bag.changed)] = changed
            answer.append(features)
        return answer

    def _kept(self, name: str, count: int, slices: Callable[[], Iterable[NDArray[np.int16]]]) -> Floats:
        path = self._folder / f"{name}.npy"
        if path.is_file():
            self.noted(count)
            return np.asarray(np.load(path), np.float32)
        found = np.concatenate([self._embedded(batch) for batch in _batches(slices())])
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        np.save(partial, found.astype(np.float16))  # as a stored bag
        partial.replace(path)
        return np.asarray(np.load(path), np.float32)

    def _embedded(self, batch: list[NDArray[np.int16]]) -> Floats:
        """Through the product's own preprocessing."""
        inputs = [encoder_input(hu.astype(np.float32), self.encoder.windows, self.encoder.input_size) for hu in batch]
        self.noted(len(batch))
        return self.encoder.encode(np.stack(inputs))


def _batches(slices: Iterable[NDArray[np.int16]]) -> Iterable[list[NDArray[np.int16]]]:
    batch: list[NDArray[np.int16]] = []
    for hu in slices:
        batch.append(hu)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch
