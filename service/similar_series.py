"""Which series are most like one: by one vector each, or slice by slice for a short list."""

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from models.heads.run import HeadRunner
from service.errors import SeriesNotFound, WorkersBusy
from service.indexing import mean_vector, unit
from service.schemas.search import SeriesHit, SeriesSearchAnswer
from service.storage.keys import EmbeddingKey
from service.storage.selection import Narrowed
from service.storage.stores import Stores

PATIENCE_SECONDS = 20.0  # for vectors that nobody asked for before
AT_ONCE = 64  # vectors kept in one write

Pool = Callable[[NDArray[np.float16]], NDArray[np.float16]]


def similar_series(
    series_uid: str,
    k: int,
    encoder_id: str,
    pooling: str,
    runner: HeadRunner | None,
    shortlist: int | None,
    narrowed: Narrowed,
    stores: Stores,
) -> SeriesSearchAnswer:
    """The k series of highest cosine; where there is a shortlist, of highest late interaction among so many.

    `pooling` is "mean", or the id of the head that `runner` runs.
    """
    stores.catalog.embedding(series_uid, encoder_id)  # raises where there is none
    contents = stores.indexes.embedded(encoder_id)
    pool: Pool = mean_vector if runner is None else lambda bag: attended_vector(bag, runner)
    vectors = _pooled(encoder_id, pooling, pool, contents, stores)
    query = vectors[series_uid].astype(np.float32)
    others = [uid for uid in vectors if uid != series_uid and narrowed.permits(uid)]
    scores = np.array([vectors[uid] for uid in others], np.float32).reshape(len(others), -1) @ query
    order = np.argsort(-scores, kind="stable")
    found = [(others[at], float(scores[at])) for at in order[: shortlist or k]]
    if shortlist is not None:
        bag = stores.bags.get(EmbeddingKey(series_uid, encoder_id), contents[series_uid])
        rescored = [
            (uid, late_interaction(bag, other))
            for uid, _ in found
            if (other := _bag(uid, encoder_id, contents, stores)) is not None
        ]
        found = sorted(rescored, key=lambda each: -each[1])[:k]
    hits = [hit for uid, score in found if (hit := _hit(uid, score, encoder_id, stores))]
    return SeriesSearchAnswer(
        hits=hits, encoder_id=encoder_id, by="late" if shortlist else pooling, compared=len(others)
    )


def attended_vector(bag: NDArray[np.float16], runner: HeadRunner) -> NDArray[np.float16]:
    """(slices, windows, dim) -> (dim,) of length one: the head's attention-weighted sum of its instances."""
    _, attention = runner.predict(bag)
    pooled = np.einsum("sw,swd->d", attention, bag.astype(np.float32))
    return unit(pooled).astype(np.float16)


def late_interaction(query: NDArray[np.float16], other: NDArray[np.float16]) -> float:
    """Mean over the query's slices and windows of the best cosine at that window (ColBERT's MaxSim, divided by n)."""
    mine, theirs = unit(query.astype(np.float32)), unit(other.astype(np.float32))
    cosines = np.einsum("qwd,owd->wqo", mine, theirs, optimize=True)
    return float(cosines.max(axis=2).mean())


def _pooled(
    encoder_id: str, pooling: str, pool: Pool, contents: dict[str, str], stores: Stores
) -> dict[str, NDArray[np.float16]]:
    """Every series' vector; those nobody asked for before are made and kept. Raises WorkersBusy."""
    kept = stores.indexes.pooled(encoder_id, pooling)
    missing = [uid for uid, content in contents.items() if kept.get(uid, ("", None))[0] != content]
    end = time.monotonic() + PATIENCE_SECONDS
    for start in range(0, len(missing), AT_ONCE):
        if time.monotonic() > end:
            raise WorkersBusy(f"{start} of {len(missing)} series were read for this head by now; ask again")
        made = {}
        for uid in missing[start : start + AT_ONCE]:
            try:
                bag = stores.bags.get(EmbeddingKey(uid, encoder_id), contents[uid])
            except FileNotFoundError:  # replaced meanwhile
                continue
            made[uid] = (contents[uid], pool(bag))
        stores.indexes.pool(encoder_id, pooling, made)
        kept |= made
    return {uid: vector for uid, (content, vector) in kept.items() if contents.get(uid) == content}


def _bag(series_uid: str, encoder_id: str, contents: dict[str, str], stores: Stores) -> NDArray[np.float16] | None:
    """None for one that was replaced or erased meanwhile."""
    try:
        return stores.bags.get(EmbeddingKey(series_uid, encoder_id), contents[series_uid])
    except FileNotFoundError:
        return None


def _hit(series_uid: str, score: float, encoder_id: str, stores: Stores) -> SeriesHit | None:
    """None for a series that was erased meanwhile."""
    try:
        series = stores.catalog.series(series_uid)
    except SeriesNotFound:
        return None
    slices = next(row.slices for row in series.embeddings if row.encoder_id == encoder_id)
    return SeriesHit(
        series_uid=series_uid,
        study_uid=series.study_uid,
        patient_id=series.patient_id,
        slices=slices or 0,
        score=score,
    )
