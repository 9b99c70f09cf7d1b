"""Which other slices, and which other series, look like this one."""

import asyncio
import time
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, File, Form, Query, UploadFile
from numpy.typing import NDArray
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from models.specs import EncoderSpec
from service.audited import Shown
from service.deps import EncodersDep, HeadsDep, QueueDep, SettingsDep, ShownDep, StoresDep, WithinDep, needs
from service.errors import BadQuery, SliceNotFound, UploadTooLarge, WindowNotFound, WorkersBusy
from service.queue import Queue
from service.rows import Hit as FoundHit
from service.schemas.base import Text
from service.schemas.search import (
    Filters,
    Hit,
    ImageSearchRequest,
    SearchAnswer,
    SearchOptions,
    SearchRequest,
    SeriesSearchAnswer,
    SeriesSearchRequest,
    SliceQuery,
    TagList,
)
from service.settings import Settings
from service.similar import Asked, Match, QuerySlice, Way
from service.similar import search as find
from service.similar_series import similar_series
from service.storage.keys import EmbeddingKey
from service.storage.selection import Wanted
from service.storage.stores import Stores

router = APIRouter(prefix="/v1", tags=["search"])

PATIENCE_SECONDS = 20.0  # as for a heat map
POLL_SECONDS = 0.02
MAX_IMAGE_BYTES = 64 * 2**20


@router.post("/search", dependencies=[needs("read", narrows=True)])
def search(
    query: SearchRequest,
    stores: StoresDep,
    settings: SettingsDep,
    encoders: EncodersDep,
    queue: QueueDep,
    shown: ShownDep,
    within: WithinDep,
) -> SearchAnswer:
    """The k nearest stored slices by cosine: to a stored slice, to several, or to a vector."""
    spec, encoder_id = encoders.spec(query.encoder), encoders.id(query.encoder)
    _check(query, spec, settings, query.window, *(each.window for each in query.queries))
    own = [each.series_uid for each in query.queries]
    _check_visible(own, within, stores)
    slices = [_stored(each, query.match, stores, encoder_id, spec) for each in query.queries]
    match = query.match
    if query.vector is not None:
        slices = [QuerySlice({query.window: _unit(np.array(query.vector), spec, encoder_id)}, query.window)]
        match = "any" if query.window is None else match
    narrowed = stores.selection.narrowed(encoder_id, _wanted(query.filters, within), query.exclude, own)
    asked = Asked(slices, query.k, match, query.combine, query.collapse == "series", query.exact)
    hits, way = find(asked, encoder_id, narrowed, settings.index_recall, stores, queue.keep_index)
    shown.series(own)
    return _answer(hits, way, encoder_id, stores, shown)


@router.post("/search/image", dependencies=[needs("read", narrows=True)])
async def search_by_image(
    file: Annotated[UploadFile, File(description="a DICOM slice, or a PNG of one at a window")],
    stores: StoresDep,
    settings: SettingsDep,
    encoders: EncodersDep,
    queue: QueueDep,
    shown: ShownDep,
    within: WithinDep,
    query: Annotated[str, Form(description="an ImageSearchRequest as JSON")] = "{}",
    encoder: Annotated[Text | None, Query(description="name or id; the service's own where unset")] = None,
) -> SearchAnswer:
    """The k nearest stored slices to one that is uploaded: a worker embeds it, and nothing of it is kept.

    503 while no worker has time; ask again.
    """
    asked = _parsed(query)
    spec, encoder_id = await run_in_threadpool(lambda: (encoders.spec(encoder), encoders.id(encoder)))
    if spec.kind != "slice2d":
        raise BadQuery("this encoder reads whole volumes; only an encoder of slices embeds one")
    _check(asked, spec, settings, asked.window)
    if asked.match == "same" and asked.window is None:
        raise BadQuery("expected a window, or match any or fused")
    content = await file.read(MAX_IMAGE_BYTES + 1)
    if len(content) > MAX_IMAGE_BYTES:
        raise UploadTooLarge(f"the file has more than {MAX_IMAGE_BYTES} bytes")
    png = content.startswith(b"\x89PNG")
    if png and (asked.window is None or asked.match == "fused"):
        raise BadQuery("a PNG shows one window: expected its name, and match same or any")
    embedding = await _embedded(content, encoder_id, asked.window if png else None, stores, queue)

    def run() -> SearchAnswer:
        narrowed = stores.selection.narrowed(encoder_id, _wanted(asked.filters, within), "none", [])
        mine = _at_windows(embedding, asked.window, asked.match, spec, encoder_id)
        what = Asked([mine], asked.k, asked.match, collapse=asked.collapse == "series", exact=asked.exact)
        hits, way = find(what, encoder_id, narrowed, settings.index_recall, stores, queue.keep_index)
        return _answer(hits, way, encoder_id, stores, shown)

    return await run_in_threadpool(run)


@router.post("/search/series", dependencies=[needs("read", narrows=True)])
def search_series(
    query: SeriesSearchRequest,
    stores: StoresDep,
    settings: SettingsDep,
    encoders: EncodersDep,
    heads: HeadsDep,
    shown: ShownDep,
    within: WithinDep,
) -> SeriesSearchAnswer:
    """The k series most like this one: by their mean, by what a head attends to, or slice by slice."""
    _check_k(query.k, settings)
    _check_visible([query.series_uid], within, stores)
    if query.head is not None:
        head = stores.heads.ready(query.head)
        if query.encoder is not None and encoders.id(query.encoder) != head.encoder_id:
            raise BadQuery(f"the head is of {head.encoder_id}, the search of another encoder")
        encoder_id, runner, pooling = head.encoder_id, heads(head.head_id), head.head_id
    else:
        encoder_id, runner, pooling = encoders.id(query.encoder), None, "mean"
    narrowed = stores.selection.narrowed(encoder_id, _wanted(query.filters, within), query.exclude, [query.series_uid])
    shortlist = query.shortlist if query.by == "late" else None
    found = similar_series(query.series_uid, query.k, encoder_id, pooling, runner, shortlist, narrowed, stores)
    shown.series([query.series_uid, *(hit.series_uid for hit in found.hits)])
    return found


@router.get("/series/{series_uid}/tags", dependencies=[needs("read")])
def get_tags(series_uid: Text, stores: StoresDep) -> TagList:
    """The series' tags."""
    return TagList(tags=stores.tags.get(series_uid))


@router.put("/series/{series_uid}/tags", dependencies=[needs("write")])
def put_tags(series_uid: Text, wanted: TagList, stores: StoresDep) -> TagList:
    """Give the series these tags and no others; searches that filter by them see it at once."""
    stores.tags.put(series_uid, wanted.tags)
    return TagList(tags=stores.tags.get(series_uid))


def _parsed(query: str) -> ImageSearchRequest:
    try:
        return ImageSearchRequest.model_validate_json(query)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise BadQuery(f"query: {wrong}") from error


def _check(query: SearchOptions, spec: EncoderSpec, settings: Settings, *windows: str | None) -> None:
    _check_k(query.k, settings)
    known = [window.name for window in spec.windows]
    for window in windows:
        if window is not None and window not in known:
            raise WindowNotFound(f"no window {window!r}, expected one of {', '.join(known)}")


def _check_k(k: int, settings: Settings) -> None:
    if k > settings.max_neighbours:
        raise BadQuery(f"k is {k}, expected at most {settings.max_neighbours}")


def _check_visible(series_uids: Sequence[str], within: Sequence[str], stores: Stores) -> None:
    for series_uid in series_uids if within else ():
        stores.tags.visible(series_uid, within)


def _wanted(filters: Filters, within: Sequence[str]) -> Wanted:
    said: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in filters.model_dump().items()
    }
    return Wanted(**said, within=within)


def _stored(query: SliceQuery, match: Match, stores: Stores, encoder_id: str, spec: EncoderSpec) -> QuerySlice:
    row = stores.catalog.embedding(query.series_uid, encoder_id)
    key = EmbeddingKey(query.series_uid, encoder_id)
    try:
        embedding = stores.bags.get_slice(key, row.content or "", query.slice)
    except IndexError as error:
        raise SliceNotFound(str(error)) from error
    return _at_windows(embedding, query.window, match, spec, encoder_id)


def _at_windows(
    embedding: NDArray[Any], window: str | None, match: Match, spec: EncoderSpec, encoder_id: str
) -> QuerySlice:
    """A slice's embedding, (windows, dim), at the windows that the search needs."""
    names = [each.name for each in spec.windows]
    needed = names if window is None or match == "fused" else [window]
    return QuerySlice({name: _unit(embedding[names.index(name)], spec, encoder_id) for name in needed}, window)


def _unit(vector: NDArray[Any], spec: EncoderSpec, encoder_id: str) -> NDArray[np.float32]:
    if vector.shape != (spec.dim,):
        raise BadQuery(f"the vector has {vector.size} numbers, expected {spec.dim} of {encoder_id}")
    with np.errstate(over="ignore"):
        single = vector.astype(np.float32)
        norm = np.linalg.norm(single)
    if not np.isfinite(norm) or norm == 0:
        raise BadQuery("the vector is zero, infinite or not a number, expected a direction")
    return np.asarray(single / norm, np.float32)


async def _embedded(
    content: bytes, encoder_id: str, window: str | None, stores: Stores, queue: Queue
) -> NDArray[np.float32]:
    """(windows, dim), by a worker. Raises BrokerDown, WorkersBusy or BadQuery; the file is gone in any case."""
    query_id = await run_in_threadpool(stores.queries.put, content)
    try:
        await run_in_threadpool(queue.embed_query, query_id, encoder_id, window or "")
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            found = await run_in_threadpool(stores.queries.get, query_id)
            if found is not None:
                return found
            await asyncio.sleep(POLL_SECONDS)
        raise WorkersBusy(f"no worker has embedded the slice within {PATIENCE_SECONDS:.0f} s; ask again later")
    finally:
        await run_in_threadpool(stores.queries.forget, query_id)


def _answer(hits: Sequence[FoundHit], way: Way, encoder_id: str, stores: Stores, shown: Shown) -> SearchAnswer:
    patients = stores.catalog.patient_ids([hit["series_uid"] for hit in hits])  # one that is being erased is in none
    known = [Hit(**{**hit, "patient_id": patients[hit["series_uid"]]}) for hit in hits if hit["series_uid"] in patients]
    shown.series(hit.series_uid for hit in known)
    return SearchAnswer(
        hits=known, encoder_id=encoder_id, index=way.index, recall=way.recall, effort=way.effort, note=way.note
    )
