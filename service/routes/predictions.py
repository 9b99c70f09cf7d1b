"""What a head says of a patient, and which slices made it say so."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from numpy.typing import NDArray

from service.deps import HeadsDep, StoresDep
from service.schemas import Attention, Instance, Predictions, Text, TopSlice
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores
from service.storage.tables import EmbeddingRow

router = APIRouter(prefix="/v1", tags=["predictions"])

TOP_SLICES = 5


@dataclass(frozen=True)
class _Bag:
    """The bags of some series one after another, and where each slice of them comes from."""

    embeddings: NDArray[np.float16]  # (slices, windows, dim)
    windows: list[str]
    slices: list[dict[str, Any]]  # series_uid, slice, sop_uid, z_mm


@router.get("/series/{series_uid}/attention")
def get_attention(series_uid: Text, head: Annotated[Text, Query()], stores: StoresDep, heads: HeadsDep) -> Attention:
    """The head's weight of every slice at every window of one series."""
    row = stores.heads.ready(head)
    bag = _read(stores, [stores.catalog.embedding(series_uid, row.encoder_id)])
    _, weights = heads(head).predict(bag.embeddings)
    instances = [
        Instance(**each, window=window, weight=float(weights[k, w]))
        for k, each in enumerate(bag.slices)
        for w, window in enumerate(bag.windows)
    ]
    return Attention(
        series_uid=series_uid,
        head_id=head,
        encoder_id=row.encoder_id,
        labels=row.labels,
        instances=instances,
        window_share=_window_share(bag, weights),
        top_slices=_top_slices(bag, weights),
    )


@router.get("/patients/{patient_id:path}/predictions")
def get_predictions(
    patient_id: Text,
    head: Annotated[Text, Query()],
    stores: StoresDep,
    heads: HeadsDep,
    series_uid: Annotated[Text | None, Query()] = None,
    study_uid: Annotated[Text | None, Query()] = None,
) -> Predictions:
    """One probability per label, from all of the patient's accepted series together."""
    row = stores.heads.ready(head)
    rows = stores.catalog.patient_embeddings(patient_id, row.encoder_id, series_uid=series_uid, study_uid=study_uid)
    bag = _read(stores, rows)
    probabilities, weights = heads(head).predict(bag.embeddings)
    return Predictions(
        patient_id=patient_id,
        head_id=head,
        encoder_id=row.encoder_id,
        probabilities=dict(zip(row.labels, map(float, probabilities), strict=True)),
        series=[each.series_uid for each in rows],
        window_share=_window_share(bag, weights),
        top_slices=_top_slices(bag, weights),
    )


def _read(stores: Stores, rows: Sequence[EmbeddingRow]) -> _Bag:
    bags, slices, windows = [], [], []
    for row in rows:
        key, content = EmbeddingKey(row.series_uid, row.encoder_id), row.content or ""
        bags.append(stores.bags.get(key, content))
        receipt = stores.bags.receipt(key, content)
        windows = receipt["windows"]
        for k, (sop_uid, z_mm) in enumerate(zip(receipt["sop_uids"], receipt["z_mm"], strict=True)):
            slices.append({"series_uid": row.series_uid, "slice": k, "sop_uid": sop_uid, "z_mm": z_mm})
    return _Bag(np.concatenate(bags), windows, slices)


def _window_share(bag: _Bag, weights: NDArray[np.float32]) -> dict[str, float]:
    return dict(zip(bag.windows, map(float, weights.sum(axis=0)), strict=True))


def _top_slices(bag: _Bag, weights: NDArray[np.float32]) -> list[TopSlice]:
    by_slice = weights.sum(axis=1)
    return [TopSlice(**bag.slices[k], weight=float(by_slice[k])) for k in np.argsort(-by_slice)[:TOP_SLICES]]
