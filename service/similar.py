"""Which stored slices are most like the ones asked about, and by which index that was found."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from service.errors import BadQuery, BrokerDown, NotIndexedYet
from service.rows import BagRows, Floats, Hit, IndexRows, Place, Rows
from service.storage.index import Effort, IndexBroken
from service.storage.selection import Narrowed
from service.storage.stores import Stores
from service.storage.tables import IndexRow

Match = Literal["same", "any", "fused"]
Combine = Literal["best", "mean"]
Find = Callable[[int, frozenset[str]], list[Hit]]  # how many, without which series

FUSED = "fused"  # the window that a hit over all windows names
NARROW_ROWS = 4096  # so few rows are read as quickly one by one, and then nothing is missed
WIDEST = 16384  # rows that a collapsed or fused search by an ANN index looks at in one step
TIE = 1e-6

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class QuerySlice:
    """A slice asked about: a vector for each window, all of length one, and the window that counts."""

    vectors: Mapping[str | None, Floats]  # a bare vector without a window is under None
    window: str | None = None


@dataclass(frozen=True)
class Asked:
    """A search, ready to run."""

    slices: Sequence[QuerySlice]
    k: int
    match: Match = "same"
    combine: Combine = "best"
    collapse: bool = False  # one hit per series
    exact: bool = False


@dataclass(frozen=True)
class Way:
    """How a search was answered."""

    index: Literal["IVF_RQ", "exact", "bags"]
    recall: float  # measured at 10; 1 where every row was read
    effort: Effort | None = None
    note: str | None = None  # why not as usual


def search(
    asked: Asked, encoder_id: str, narrowed: Narrowed, wanted_recall: float, stores: Stores, mend: Callable[[], None]
) -> tuple[list[Hit], Way]:
    """The k best hits, and the way they were found. Raises NotIndexedYet or BadQuery.

    Where the index cannot be read, `mend` is called, and the bags answer.
    """
    for last in (False, True):  # the table may be another one between two reads, or its files written anew
        row = stores.indexes.get(encoder_id)
        if row is None or row.broken or not stores.index.exists(row.table_name):
            break
        way = _way(row, asked.exact, narrowed, wanted_recall)
        try:
            rows = IndexRows(stores.index, row.table_name, narrowed, way.effort)
            return _found(asked, rows), way
        except IndexBroken as error:
            if not last:
                continue
            log.warning("search by %s: %s", encoder_id, error)
            stores.indexes.broken(encoder_id, row.table_name)
            _send(mend)
    contents = stores.indexes.embedded(encoder_id)
    if not contents:
        raise NotIndexedYet(f"nothing is embedded by {encoder_id} yet")
    if row is not None and not row.broken and stores.indexes.rows(encoder_id):
        stores.indexes.broken(encoder_id, row.table_name)  # its files are gone
        _send(mend)
    note = "the index is not there or is being made anew; every bag was read"
    return _found(asked, BagRows(stores, encoder_id, contents, narrowed)), Way("bags", 1.0, note=note)


def _way(row: IndexRow, exact: bool, narrowed: Narrowed, wanted_recall: float) -> Way:
    if exact or row.built_rows is None:
        return Way("exact", 1.0)
    if narrowed.rows is not None and narrowed.rows <= NARROW_ROWS:
        return Way("exact", 1.0, note=f"{narrowed.rows} rows may answer: each was read")
    recall = row.recall or 0.0
    if row.nprobes is None or row.refine is None or recall < wanted_recall:
        note = f"the ANN index finds {recall:.3f} of the true neighbours, expected {wanted_recall}: every row was read"
        return Way("exact", 1.0, note=note)
    raised = len((row.measured or {}).get("tried", [])) > 1
    notes = ["less effort was measured to find too little: effort is raised"] if raised else []
    if narrowed.only is not None or narrowed.without:
        notes.append("recall was measured without filters or exclusions")
    return Way("IVF_RQ", recall, Effort(row.nprobes, row.refine), "; ".join(notes) or None)


def _send(mend: Callable[[], None]) -> None:
    try:
        mend()
    except BrokerDown:
        log.warning("broker does not answer; the sweep will send for the index's upkeep later")


def _found(asked: Asked, rows: Rows) -> list[Hit]:
    finds = [_find(query, asked.match, rows) for query in _combined(asked)]

    def find(k: int, without: frozenset[str]) -> list[Hit]:
        return _best([hit for each in finds for hit in each(k, without)], k)

    return _collapsed(find, asked.k) if asked.collapse else find(asked.k, frozenset())


def _combined(asked: Asked) -> Sequence[QuerySlice]:
    """The slices, or their mean: the cosine to it, times its length, is the mean of the cosines."""
    if asked.combine == "best" or len(asked.slices) == 1:
        return asked.slices
    windows = {query.window for query in asked.slices}
    if asked.match != "fused" and len(windows) > 1:
        raise BadQuery("the mean of slices at different windows is none; expected one window, or match fused")
    means = {
        window: np.mean([query.vectors[window] for query in asked.slices], axis=0) for window in asked.slices[0].vectors
    }
    return [QuerySlice(means, asked.slices[0].window)]


def _find(query: QuerySlice, match: Match, rows: Rows) -> Find:
    if match == "fused":
        return lambda k, without: _fused(query.vectors, rows, k, without)
    windows: list[str | None] = list(query.vectors) if query.window is None else [query.window]

    def find(k: int, without: frozenset[str]) -> list[Hit]:
        hits = []
        for window in windows:
            vector, at = query.vectors[window], None if match == "any" else window
            length = float(np.linalg.norm(vector))
            for hit in rows.nearest(vector, k, at, without) if length else []:
                hits.append({**hit, "score": hit["score"] * length})
        return _best(hits, k)

    return find


def _best(hits: Sequence[Hit], k: int) -> list[Hit]:
    """Of every row its best score; the k best rows, equal ones in the order of their names."""
    best: dict[tuple[str, int, str], Hit] = {}
    for hit in hits:
        name = (hit["series_uid"], hit["slice"], hit["window"])
        if name not in best or hit["score"] > best[name]["score"]:
            best[name] = hit
    return [hit for _, hit in sorted(best.items(), key=lambda each: (-each[1]["score"], each[0]))[:k]]


def _collapsed(find: Find, k: int) -> list[Hit]:
    """The best hit of each of the k best series: rows are asked for in growing steps, without series already found."""
    found: dict[str, Hit] = {}
    step = 4 * k
    while len(found) < k:
        hits = find(step, frozenset(found))
        for hit in hits:
            found.setdefault(hit["series_uid"], hit)
        if len(hits) < step:
            break
        step = min(2 * step, WIDEST)
    return list(found.values())[:k]


def _fused(vectors: Mapping[str | None, Floats], rows: Rows, k: int, without: frozenset[str]) -> list[Hit]:
    """The slices of the highest mean cosine over the windows (Fagin's threshold algorithm).

    Each window's own list is read until no slice beyond its end can come among the k best: such a slice's
    mean is at most the mean of the lists' last scores.
    """
    step = 4 * k
    while True:
        lists = [rows.nearest(vector, step, window, without) for window, vector in vectors.items()]
        seen: dict[Place, Hit] = {(hit["series_uid"], hit["slice"]): hit for hits in lists for hit in hits}
        stored = rows.vectors(seen)
        fused = [
            {**hit, "window": FUSED, "score": _mean_cosine(vectors, stored[place])}
            for place, hit in seen.items()
            if place in stored
        ]
        best = _best(fused, k)
        lengths = [float(np.linalg.norm(vector)) for vector in vectors.values()]
        bound = np.mean(
            [hits[-1]["score"] * length for hits, length in zip(lists, lengths, strict=True) if hits] or [0]
        )
        ended = any(len(hits) < step for hits in lists)
        enough = len(best) == k and best[-1]["score"] >= bound - TIE
        if ended or enough or (step >= WIDEST and isinstance(rows, IndexRows) and rows.effort is not None):
            return best
        step *= 4


def _mean_cosine(vectors: Mapping[str | None, Floats], stored: Mapping[str, Floats]) -> float:
    return float(np.mean([vector @ stored[window] for window, vector in vectors.items() if window is not None]))
