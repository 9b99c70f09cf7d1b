"""How many of the true neighbours an ANN index finds, measured on stored vectors."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import Damaged
from service.storage.bags import Bags
from service.storage.index import Effort, SliceIndex, quoted
from service.storage.indexes import Measured
from service.storage.keys import EmbeddingKey

K = 10
QUERIES = 64
KEPT = 4 * K  # best rows of each query: room for those that tie with the tenth
TIE = 1e-6  # cosine; nearer than this, two rows are equally good
AIM = 0.99  # the first effort that reaches this is taken, where the setting asks for less
LADDER = (Effort(20, 10), Effort(60, 20), Effort(200, 50))

Row = tuple[str, int, str]  # series UID, slice, window


@dataclass(frozen=True)
class Probe:
    """A stored vector that its neighbours are asked for."""

    row: Row
    vector: NDArray[np.float32]  # (dim,), of length one


def measure_recall(
    index: SliceIndex, name: str, probes: Sequence[Probe], wanted: float, build_seconds: float
) -> Measured:
    """Recall at 10 of more and more effort, until one finds enough.

    As a caller searches: within the vector's own window, itself not counted.
    """
    truth, tried, best, rows = true_neighbours(index, name, probes), [], None, index.count(name)
    for effort in LADDER:
        found = float(np.mean([_recall(index, name, probe, truth[probe.row], effort) for probe in probes]))
        tried.append({**asdict(effort), "recall": found})
        if best is None or found > best[0]:
            best = (found, effort)
        if found >= max(AIM, wanted):
            break
    assert best is not None  # the ladder has steps
    recall, effort = best
    return Measured(rows, len(probes), recall, effort if recall >= wanted else None, tried, build_seconds)


def draw_probes(bags: Bags, windows: Sequence[str], contents: dict[EmbeddingKey, str], seed: int = 0) -> list[Probe]:
    """Some stored vectors, drawn series by series; the same ones each time."""
    draw = random.Random(seed)
    probes, keys = [], sorted(contents)
    for key in (draw.choice(keys) for _ in range(QUERIES)):
        try:
            bag = bags.get(key, contents[key])
        except (FileNotFoundError, Damaged):  # replaced meanwhile; or the upkeep finds out
            continue
        number, window = draw.randrange(len(bag)), draw.randrange(bag.shape[1])
        vector = bag[number, window].astype(np.float32)
        if norm := np.linalg.norm(vector):
            probes.append(Probe((key.series_uid, number, windows[window]), vector / norm))
    return probes


def true_neighbours(index: SliceIndex, name: str, probes: Sequence[Probe]) -> dict[Row, set[Row]]:
    """For each probe the rows that may stand among its ten best: one pass over the table, by matrix products."""
    queries = np.array([probe.vector for probe in probes])  # (probes, dim)
    best: list[list[tuple[float, Row]]] = [[] for _ in probes]
    for batch in index.batches(name, ["series_uid", "slice", "window", "vector"]):
        vectors = batch["vector"].flatten().to_numpy().reshape(len(batch), -1).astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1)
        scores = queries @ vectors.T / np.where(lengths, lengths, 1.0)  # (probes, rows)
        windows = batch["window"].to_numpy(zero_copy_only=False)
        series, slices = batch["series_uid"], batch["slice"]
        for mine, probe, every in zip(best, probes, scores, strict=True):
            own = np.where(windows == probe.row[2], every, -np.inf)
            for at in np.argpartition(-own, min(KEPT, len(own) - 1))[:KEPT]:
                row = (series[int(at)].as_py(), slices[int(at)].as_py(), str(windows[at]))
                if np.isfinite(own[at]) and row != probe.row:
                    mine.append((float(own[at]), row))
            mine.sort(key=lambda each: -each[0])
            del mine[KEPT:]
    return {probe.row: _best(mine) for probe, mine in zip(probes, best, strict=True)}


def _best(scored: list[tuple[float, Row]]) -> set[Row]:
    worst = scored[min(K, len(scored)) - 1][0] - TIE if scored else 0.0
    return {row for score, row in scored if score >= worst}


def _recall(index: SliceIndex, name: str, probe: Probe, truth: set[Row], effort: Effort) -> float:
    hits = index.nearest(name, probe.vector, K + 1, f"window = {quoted(probe.row[2])}", effort)
    rows = [row for hit in hits if (row := _row(hit)) != probe.row][:K]
    return sum(row in truth for row in rows) / max(1, min(K, len(truth)))


def _row(hit: dict[str, Any]) -> Row:
    return hit["series_uid"], hit["slice"], hit["window"]
