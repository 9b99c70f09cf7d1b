"""Which other slices look like this one."""

import numpy as np
from fastapi import APIRouter
from numpy.typing import NDArray

from service.deps import EncodersDep, SettingsDep, StoresDep
from service.errors import BadQuery, SliceNotFound, WindowNotFound
from service.schemas.search import Filters, Hit, SearchAnswer, SearchRequest
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

router = APIRouter(prefix="/v1", tags=["search"])


@router.post("/search")
def search(query: SearchRequest, stores: StoresDep, settings: SettingsDep, encoders: EncodersDep) -> SearchAnswer:
    """The k nearest stored slices by cosine, from a stored slice at a window or from a vector."""
    if query.k > settings.max_neighbours:
        raise BadQuery(f"k is {query.k}, expected at most {settings.max_neighbours}")
    spec, encoder_id = encoders.spec(query.encoder), encoders.id(query.encoder)
    windows = [window.name for window in spec.windows]
    if query.window is not None and query.window not in windows:
        raise WindowNotFound(f"no window {query.window!r}, expected one of {', '.join(windows)}")
    vector = _stored(query, stores, encoder_id, windows) if query.vector is None else np.array(query.vector)
    if vector.shape != (spec.dim,):
        raise BadQuery(f"the vector has {vector.size} numbers, expected {spec.dim} of {encoder_id}")
    with np.errstate(over="ignore"):
        norm = np.linalg.norm(vector.astype(np.float32))
    if not np.isfinite(norm) or norm == 0:
        raise BadQuery("the vector is zero, infinite or not a number, expected a direction")
    where = _where(query, stores)
    hits = stores.index.nearest(encoder_id, vector / norm, query.k, " AND ".join(where)) if where is not None else []
    patients = stores.catalog.patient_ids([hit["patient_key"] for hit in hits])
    answers = [
        Hit(**{**hit, "patient_id": patients[hit["patient_key"]], "score": 1.0 - hit["_distance"]}) for hit in hits
    ]
    return SearchAnswer(hits=answers, encoder_id=encoder_id, index="exact", recall=1.0)


def _stored(query: SearchRequest, stores: Stores, encoder_id: str, windows: list[str]) -> NDArray[np.float64]:
    assert query.series_uid is not None and query.slice is not None and query.window is not None  # by the schema
    row = stores.catalog.embedding(query.series_uid, encoder_id)
    bag = stores.bags.get(EmbeddingKey(query.series_uid, encoder_id), row.content or "")
    if query.slice >= len(bag):
        raise SliceNotFound(f"no slice {query.slice}, expected 0 to {len(bag) - 1}")
    vector: NDArray[np.float64] = bag[query.slice, windows.index(query.window)].astype(np.float64)
    return vector


def _where(query: SearchRequest, stores: Stores) -> list[str] | None:
    """Conditions on the rows that may answer, or None where no row can."""
    conditions = [] if query.window is None else [f"window = {_quoted(query.window)}"]
    if query.exclude != "none":
        assert query.series_uid is not None  # by the schema
        series = stores.catalog.series(query.series_uid)
        column, value = {
            "series": ("series_uid", series.series_uid),
            "study": ("study_uid", series.study_uid),
            "patient": ("patient_key", series.patient_key),
        }[query.exclude]
        conditions.append(f"{column} != {_quoted(value)}")
    filters: Filters = query.filters
    if filters.series_uid is not None:
        conditions.append(f"series_uid = {_quoted(filters.series_uid)}")
    if filters.study_uid is not None:
        conditions.append(f"study_uid = {_quoted(filters.study_uid)}")
    if filters.patient_id is not None:
        patient_key = stores.catalog.patient_key(filters.patient_id)
        if patient_key is None:
            return None
        conditions.append(f"patient_key = {_quoted(patient_key)}")
    return conditions


def _quoted(value: str) -> str:
    """An SQL string literal; Lance takes no bound parameters."""
    return "'" + value.replace("'", "''") + "'"
