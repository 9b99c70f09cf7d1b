"""The rows a search reads: those of the index, or, while it cannot be read, the bags themselves."""

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import SeriesNotFound
from service.indexing import unit
from service.storage.bags import slices_of
from service.storage.index import Effort, SliceIndex, one_of, quoted
from service.storage.keys import EmbeddingKey
from service.storage.selection import Narrowed
from service.storage.stores import Stores

Floats = NDArray[np.float32]
Hit = dict[str, Any]  # what SliceIndex.nearest() answers
Place = tuple[str, int]  # series UID, slice


class Rows(Protocol):
    def nearest(self, vector: Floats, k: int, window: str | None, without: frozenset[str]) -> list[Hit]:
        """The k rows of highest cosine that may answer, best first; at any window for None."""
        ...

    def vectors(self, places: Iterable[Place]) -> dict[Place, dict[str, Floats]]:
        """Of these slices, at every window, of length one."""
        ...


@dataclass(frozen=True)
class IndexRows:
    """By a Lance table. Raises IndexBroken."""

    index: SliceIndex
    name: str
    narrowed: Narrowed
    effort: Effort | None  # None: exact

    def nearest(self, vector: Floats, k: int, window: str | None, without: frozenset[str]) -> list[Hit]:
        if self.narrowed.only is not None and not self.narrowed.only - without:
            return []
        where = _where(self.narrowed, window, without)
        return self.index.nearest(self.name, vector, k, where, self.effort)

    def vectors(self, places: Iterable[Place]) -> dict[Place, dict[str, Floats]]:
        by_series: dict[str, list[int]] = {}
        for series_uid, number in places:
            by_series.setdefault(series_uid, []).append(number)
        if not by_series:
            return {}
        rows = self.index.rows(self.name, " OR ".join(_slices(uid, numbers) for uid, numbers in by_series.items()))
        vectors = unit(rows["vector"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1).astype(np.float32))
        names = zip(*(rows[column].to_pylist() for column in ("series_uid", "slice", "window")), strict=True)
        found: dict[Place, dict[str, Floats]] = {}
        for (series_uid, number, window), vector in zip(names, vectors, strict=True):
            found.setdefault((series_uid, number), {})[window] = vector
        return found


@dataclass(frozen=True)
class BagRows:
    """By reading every bag: slow, exact, and always there."""

    stores: Stores
    encoder_id: str
    contents: Mapping[str, str]  # of each series' bag
    narrowed: Narrowed

    def nearest(self, vector: Floats, k: int, window: str | None, without: frozenset[str]) -> list[Hit]:
        query = unit(vector.astype(np.float32))
        return heapq.nlargest(k, self._scored(query, k, window, without), key=lambda hit: float(hit["score"]))

    def vectors(self, places: Iterable[Place]) -> dict[Place, dict[str, Floats]]:
        found = {}
        for series_uid, number in places:
            try:
                bag, receipt = self._bag(series_uid)
            except FileNotFoundError:  # as above; whoever asks leaves the slice out
                continue
            found[(series_uid, number)] = dict(zip(receipt["windows"], unit(bag[number]), strict=True))
        return found

    def _scored(self, query: Floats, k: int, window: str | None, without: frozenset[str]) -> Iterator[Hit]:
        """The k best rows of every series that may answer."""
        for series_uid in self.contents:
            if series_uid in without or not self.narrowed.permits(series_uid):
                continue
            try:
                bag, receipt = self._bag(series_uid)
                series = self.stores.catalog.series(series_uid)
            except (FileNotFoundError, SeriesNotFound):  # replaced or erased meanwhile
                continue
            windows = receipt["windows"]
            scores = unit(bag) @ query  # (slices, windows)
            if window is not None:
                scores[:, [each != window for each in windows]] = -np.inf
            for at in np.argsort(-scores, axis=None, kind="stable")[:k]:
                number, place = divmod(int(at), len(windows))
                if np.isfinite(scores[number, place]):
                    yield {
                        "series_uid": series_uid,
                        **slices_of(receipt)[number],
                        "window": windows[place],
                        "patient_key": series.patient_key,
                        "study_uid": series.study_uid,
                        "score": float(scores[number, place]),
                    }

    def _bag(self, series_uid: str) -> tuple[Floats, dict[str, Any]]:
        key, content = EmbeddingKey(series_uid, self.encoder_id), self.contents[series_uid]
        return self.stores.bags.get(key, content).astype(np.float32), self.stores.bags.receipt(key, content)


def _where(narrowed: Narrowed, window: str | None, without: frozenset[str]) -> str | None:
    conditions = [] if window is None else [f"window = {quoted(window)}"]
    if narrowed.only is not None:
        conditions.append(one_of("series_uid", sorted(narrowed.only - without)))
    elif excluded := narrowed.without | without:
        conditions.append(f"NOT ({one_of('series_uid', sorted(excluded))})")
    return " AND ".join(conditions) or None


def _slices(series_uid: str, numbers: Sequence[int]) -> str:
    return f"(series_uid = {quoted(series_uid)} AND slice IN ({', '.join(map(str, numbers))}))"
