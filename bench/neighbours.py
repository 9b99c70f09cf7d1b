"""What the search bench measures by: true neighbours, recall, times, and the other libraries' indexes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.storage.index import SliceIndex

K = 10
TIE = 1e-6  # cosine; nearer than this, two rows are equally good
WARM = 10  # searches before those that are timed
PARTITIONS = 2048  # of faiss's IVF_FLAT, twice the square root of a million
TRAINED_ON = 40  # rows for each of them
LINKS = 32  # of a row in faiss's HNSW
EFFORTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

Floats = NDArray[np.float32]
Search = Callable[[int], Sequence[float]]  # the number of a query -> the cosines of its hits


@dataclass(frozen=True)
class Kind:
    """Which rows may answer: those of the query's own window, of some series."""

    own_window: bool = True
    series: frozenset[str] | None = None


def in_turns(
    searches: Mapping[str, Search], queries: int
) -> tuple[dict[str, list[float]], dict[str, list[Sequence[float]]]]:
    """Seconds and cosines of every query by each of the searches, query by query, so that all see the same machine."""
    for search in searches.values():
        for query in range(min(WARM, queries)):
            search(query)
    seconds: dict[str, list[float]] = {name: [] for name in searches}
    found: dict[str, list[Sequence[float]]] = {name: [] for name in searches}
    for query in range(queries):
        for name, search in searches.items():
            started = time.perf_counter()
            hits = search(query)
            seconds[name].append(time.perf_counter() - started)
            found[name].append(hits)
    return seconds, found


def recall(found: Sequence[Sequence[float]], tenth: Floats) -> float:
    """Share of the K hits that are as near as the K-th true neighbour, mean over the queries."""
    return float(
        np.mean([sum(score >= worst - TIE for score in hits[:K]) / K for hits, worst in zip(found, tenth, strict=True)])
    )


def tenths(
    index: SliceIndex, table: str, vectors: Floats, windows: Sequence[str], kinds: Mapping[str, Kind]
) -> dict[str, Floats]:
    """(queries,) cosine of each query's K-th nearest row among those that may answer: a pass over every row."""
    best = {name: np.full((len(vectors), K), -np.inf, np.float32) for name in kinds}
    asked = np.array(windows)
    for batch in index.batches(table, ["series_uid", "window", "vector"]):
        scores = vectors @ _rows(batch).T  # (queries, rows)
        at = batch["window"].to_numpy(zero_copy_only=False)
        series = batch["series_uid"].to_pylist()
        for name, kind in kinds.items():
            may = np.ones(scores.shape, bool) if not kind.own_window else asked[:, None] == at[None, :]
            if kind.series is not None:
                may &= np.array([uid in kind.series for uid in series])
            both = np.concatenate([best[name], np.where(may, scores, -np.inf)], axis=1)
            best[name] = -np.partition(-both, K - 1, axis=1)[:, :K]
    return {name: scores.min(axis=1) for name, scores in best.items()}


def all_rows(index: SliceIndex, table: str) -> Floats:
    """(rows, dim), of length one."""
    found: Floats | None = None
    done, rows = 0, index.count(table)
    for batch in index.batches(table, ["vector"]):
        vectors = _rows(batch)
        if found is None:
            found = np.empty((rows, vectors.shape[1]), np.float32)
        found[done : done + len(vectors)] = vectors
        done += len(vectors)
    assert found is not None  # the table has rows
    return found


def rivals(rows: Floats, vectors: Floats, tenth: Floats, aim: float, hnsw: bool) -> Iterator[tuple[str, Search]]:
    """faiss's and numpy's ways, each at the least effort by which it finds as much as `aim`, or all effort there is."""
    import faiss

    dim = rows.shape[1]

    def by(index: Any) -> Search:
        return lambda query: index.search(vectors[query : query + 1], K)[0][0]  # type: ignore[no-any-return]

    partitions = min(PARTITIONS, max(1, len(rows) // TRAINED_ON))
    ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, partitions, faiss.METRIC_INNER_PRODUCT)
    chosen = np.random.default_rng(0).choice(len(rows), min(len(rows), partitions * TRAINED_ON), replace=False)
    ivf.train(rows[np.sort(chosen)])
    ivf.add(rows)
    probes = _least(lambda effort: setattr(ivf, "nprobe", effort), by(ivf), tenth, aim)
    yield f"faiss IVF_FLAT, {partitions} partitions, nprobe {probes}", by(ivf)
    if hnsw:
        graph = faiss.IndexHNSWFlat(dim, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.add(rows)
        effort = _least(lambda effort: setattr(graph.hnsw, "efSearch", effort), by(graph), tenth, aim)
        yield f"faiss HNSW, {LINKS} links, efSearch {effort}", by(graph)


def by_numpy(rows: Floats, vectors: Floats) -> Search:
    """All cosines, then the best ten."""

    def search(query: int) -> Sequence[float]:
        scores = rows @ vectors[query]
        return scores[np.argpartition(-scores, K)[:K]]  # type: ignore[no-any-return]

    return search


def _least(set_effort: Callable[[int], None], search: Search, tenth: Floats, aim: float) -> int:
    for effort in EFFORTS:
        set_effort(effort)
        if recall([search(query) for query in range(len(tenth))], tenth) >= aim:
            break
    return effort


def _rows(batch: Any) -> Floats:
    vectors = batch["vector"].flatten().to_numpy().reshape(len(batch), -1).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths, lengths, np.float32(1)))
