"""Series: DICOM in, their state, a slice as a picture."""

import io
from typing import Annotated

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from PIL import Image
from starlette.concurrency import run_in_threadpool

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.windows import WINDOWS, Window, apply_window
from service.deps import EncodersDep, QueueDep, RoomDep, SenderDep, SettingsDep, ShownDep, StoresDep, WithinDep, needs
from service.errors import BadQuery, NotEmbeddedYet, SliceNotFound, WindowNotFound
from service.intake import Intake, take_in
from service.queue import Queue
from service.schemas.base import Text
from service.schemas.cohorts import SeriesQuery
from service.schemas.series import FileSetAside, Series, SeriesPage, SeriesReceived, UploadReceived
from service.storage.bags import slices_of
from service.storage.keys import EmbeddingKey
from service.storage.staging import staging
from service.storage.stores import Stores
from service.uploads import FIELD, receive_files

router = APIRouter(prefix="/v1/series", tags=["series"])

UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {
                        FIELD: {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "DICOM files or NIfTI volumes, or zip, tar, tar.gz, tar.xz archives of them",
                        }
                    },
                }
            }
        },
    }
}


@router.post("", status_code=202, openapi_extra=UPLOAD_BODY, dependencies=[needs("write")])
async def post_series(
    request: Request,
    stores: StoresDep,
    settings: SettingsDep,
    queue: QueueDep,
    encoders: EncodersDep,
    room: RoomDep,
    sender: SenderDep,
    shown: ShownDep,
    encoder: Annotated[Text | None, Query(description="name; the service's own where unset")] = None,
    patient_id: Annotated[
        str, Query(max_length=64, pattern=r"^[^\\\x00-\x1f]*$", description="of NIfTI volumes, which name no patient")
    ] = "",
) -> UploadReceived:
    """Take DICOM series and NIfTI volumes in and embed them. The same upload again changes nothing."""
    encoder_id = await run_in_threadpool(encoders.id, encoder)
    async with contextmanager_in_threadpool(staging(settings.staging_dir)) as folder:
        files = await receive_files(
            request.stream(),
            request.headers.get("content-type", ""),
            folder,
            room,
            max_files=settings.max_upload_files,
        )
        intake = await run_in_threadpool(take_in, files, folder, encoder_id, stores, settings, patient_id, sender)
    shown.series(each.series_uid for each in intake.series)
    shown.about(job=intake.job_id)
    return await run_in_threadpool(_ask, intake, stores, queue)


@router.post("/{series_uid}/complete", status_code=202, dependencies=[needs("write")])
def complete_series(series_uid: Text, stores: StoresDep, queue: QueueDep) -> Series:
    """Say that the series is whole: it is embedded now, not after its quiet time."""
    queue.embed(stores.catalog.complete(series_uid))
    return Series.model_validate(stores.catalog.series(series_uid))


@router.post("/{series_uid}/retry", status_code=202, dependencies=[needs("write")])
def retry_series(series_uid: Text, stores: StoresDep, queue: QueueDep) -> Series:
    """Embed a series that failed once more, from its files in the archive."""
    queue.embed([stores.catalog.retry(series_uid)])
    return Series.model_validate(stores.catalog.series(series_uid))


@router.get("", dependencies=[needs("read", narrows=True)])
def list_series(
    query: Annotated[SeriesQuery, Query()], stores: StoresDep, shown: ShownDep, within: WithinDep
) -> SeriesPage:
    """The series here, in the order of their UIDs."""
    rows = stores.cohorts.series(
        query.chosen(within),
        words=query.text.split(),
        tags=query.tag,
        state=query.state,
        after=query.cursor,
        limit=query.limit + 1,
    )
    page = [Series.model_validate(row) for row in rows[: query.limit]]
    shown.series(each.series_uid for each in page)
    return SeriesPage(series=page, next_cursor=page[-1].series_uid if len(rows) > query.limit else None)


@router.get("/{series_uid}", dependencies=[needs("read")])
def get_series(series_uid: Text, stores: StoresDep) -> Series:
    """State, verdict, geometry, and which embeddings there are."""
    return Series.model_validate(stores.catalog.series(series_uid))


@router.get(
    "/{series_uid}/slices/{slice_number}/image",
    response_class=Response,
    responses={200: {"content": {"image/png": {}}}},
    dependencies=[needs("read")],
)
def get_image(
    series_uid: Text,
    slice_number: int,
    stores: StoresDep,
    window: Annotated[Text, Query()] = "abdomen",
    low: Annotated[int | None, Query(ge=-32768, le=32767, description="HU shown black; with `high`")] = None,
    high: Annotated[int | None, Query(ge=-32768, le=32767, description="HU shown white; with `low`")] = None,
) -> Response:
    """The slice at a window, a named one or from `low` to `high`, as an 8-bit PNG of its own rows and columns."""
    shown_at = _window(window, low, high)
    embedded = [row for row in stores.catalog.series(series_uid).embeddings if row.content]
    if not embedded:
        raise NotEmbeddedYet(f"series {series_uid} has no numbered slices before it is embedded")
    receipt = stores.bags.receipt(EmbeddingKey(series_uid, embedded[0].encoder_id), embedded[0].content or "")
    slices = slices_of(receipt)
    if not 0 <= slice_number < len(slices):
        raise SliceNotFound(f"no slice {slice_number}, expected 0 to {len(slices) - 1}")
    asked = slices[slice_number]
    try:
        with stores.archive.reading(series_uid, [asked["sop_uid"]]) as (path,):
            hu = read_hu(path, asked["frame"])
    except UndecodableSlice as error:
        raise SliceNotFound(f"slice {slice_number} can no longer be read: {error}") from error
    picture = io.BytesIO()
    Image.fromarray(np.round(apply_window(hu, shown_at) * 255).astype(np.uint8)).save(picture, "PNG")
    # A minute: slices that come later may move the numbers.
    headers = {"Cache-Control": "private, max-age=60"}
    return Response(picture.getvalue(), media_type="image/png", headers=headers)


def _window(name: str, low: int | None, high: int | None) -> Window:
    if low is None and high is None:
        if name not in WINDOWS:
            raise WindowNotFound(f"no window {name!r}, expected one of {', '.join(WINDOWS)}")
        return WINDOWS[name]
    if low is None or high is None or low >= high:
        raise BadQuery(f"low {low} and high {high} are no window, expected both, and low below high")
    return Window("free", low, high)


def _ask(intake: Intake, stores: Stores, queue: Queue) -> UploadReceived:
    """Send for the embeddings of what was taken in, and tell the sender."""
    queue.embed(stores.catalog.waiting(intake.job_id))
    states = {row.series_uid: row.state for row, _ in stores.jobs.series(intake.job_id)}
    received = [
        SeriesReceived(
            series_uid=each.series_uid,
            state=states[each.series_uid],
            received=each.received,
            duplicates=each.duplicates,
            set_aside=[FileSetAside.model_validate(file) for file in each.set_aside],
        )
        for each in intake.series
    ]
    strays = [FileSetAside.model_validate(file) for file in intake.set_aside]
    return UploadReceived(job_id=intake.job_id, series=received, set_aside=strays)
