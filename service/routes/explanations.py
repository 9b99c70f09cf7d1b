"""Where in a slice a head finds its evidence, as a picture or as numbers."""

import asyncio
import io
import time
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from PIL import Image
from starlette.concurrency import run_in_threadpool

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.windows import Window, apply_window
from service.deps import EncoderNames, EncodersDep, HeadsDep, QueueDep, StoresDep, needs
from service.errors import BadQuery, LabelNotFound, SliceNotFound, WindowNotFound, WorkersBusy
from service.explanations import Explained, explain_series
from service.overlay import overlay
from service.queue import Queue
from service.schemas.base import Text
from service.schemas.predictions import HeatMap
from service.storage.keys import HeatSpot
from service.storage.stores import Stores

router = APIRouter(prefix="/v1", tags=["predictions"], dependencies=[needs("read")])

PATIENCE_SECONDS = 20.0  # a worker needs about a second, and more where it must load the encoder first
POLL_SECONDS = 0.05

PICTURE, NUMBERS = "image/png", "application/json"


@router.get(
    "/series/{series_uid}/slices/{slice_number}/heatmap",
    response_model=HeatMap,
    responses={200: {"content": {PICTURE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def get_heatmap(
    series_uid: Text,
    slice_number: int,
    head: Annotated[Text, Query()],
    stores: StoresDep,
    heads: HeadsDep,
    queue: QueueDep,
    encoders: EncodersDep,
    label: Annotated[Text | None, Query(description="of the head; its first where unset")] = None,
    window: Annotated[Text | None, Query(description="of the encoder; that of the largest weight where unset")] = None,
    full: Annotated[
        float | None, Query(gt=0, description="log-odds of full colour; the slice's largest where unset")
    ] = None,
    accept: Annotated[str, Header()] = PICTURE,
) -> Any:
    """Evidence for a label (orange) and against it (blue) over the slice; its cells with `Accept: application/json`.

    Made by a worker on first asking, and kept. 503 while no worker has time; ask again.
    """

    def asked() -> tuple[Explained, HeatSpot, Window]:
        found = explain_series(stores, heads, head, series_uid)
        windows = _windows(found, encoders)
        return found, (spot := _spot(found, series_uid, slice_number, label, window)), windows[spot.window]

    found, spot, seen = await run_in_threadpool(asked)
    made = await _made(spot, stores, queue)
    answer = _heat_map(found, spot, made)
    if NUMBERS in accept:
        return answer
    picture = await run_in_threadpool(_picture, answer, seen, full, stores)
    headers = {
        "Cache-Control": "private, max-age=60",  # slices that come later may move the numbers
        "X-Keyslice-Method": answer.method,
        "X-Keyslice-Weight": f"{answer.weight:.6g}",
        "X-Keyslice-Strongest": f"{max((abs(cell) for row in answer.cells for cell in row), default=0.0):.6g}",
    }
    return Response(picture, media_type=PICTURE, headers=headers)


def _windows(found: Explained, encoders: EncoderNames) -> dict[str, Window]:
    """The encoder's windows by name, once it is sure that a worker can run it."""
    encoders.id(found.head.encoder_id)
    spec = encoders.spec(found.head.encoder_id)
    if spec.kind != "slice2d":
        raise BadQuery("the head's encoder reads whole volumes; only an encoder of slices has heat maps")
    return {window.name: window for window in spec.windows}


def _spot(found: Explained, series_uid: str, number: int, label: str | None, window: str | None) -> HeatSpot:
    """What is asked for, if it is there."""
    if not 0 <= number < len(found.bag.slices):
        raise SliceNotFound(f"no slice {number}, expected 0 to {len(found.bag.slices) - 1}")
    labels, windows = found.head.labels, found.bag.windows
    if label is None:
        label = labels[0]
    if label not in labels:
        raise LabelNotFound(f"the head has no label {label!r}, expected one of {', '.join(labels)}")
    if window is None:
        window = windows[int(found.reading.attention[number].argmax())]
    if window not in windows:
        raise WindowNotFound(f"no window {window!r}, expected one of {', '.join(windows)}")
    return HeatSpot(series_uid, found.bag.contents[series_uid], found.head.head_id, number, window, label)


async def _made(spot: HeatSpot, stores: Stores, queue: Queue) -> dict[str, Any]:
    """The heat map, from the store or by a worker. Raises BrokerDown or WorkersBusy."""
    made = await run_in_threadpool(stores.heatmaps.get, spot)
    if made is None:
        await run_in_threadpool(queue.heat_map, spot)
    end = time.monotonic() + PATIENCE_SECONDS
    while made is None:
        if time.monotonic() > end:
            raise WorkersBusy(f"no worker has made the heat map within {PATIENCE_SECONDS:.0f} s; ask again later")
        await asyncio.sleep(POLL_SECONDS)
        made = await run_in_threadpool(stores.heatmaps.get, spot)
    return made


def _heat_map(found: Explained, spot: HeatSpot, made: dict[str, Any]) -> HeatMap:
    return HeatMap(
        **found.bag.slices[spot.slice],
        window=spot.window,
        label=spot.label,
        head_id=spot.head_id,
        encoder_id=found.head.encoder_id,
        weight=float(found.reading.attention[spot.slice, found.bag.windows.index(spot.window)]),
        **made,
    )


def _picture(answer: HeatMap, window: Window, full: float | None, stores: Stores) -> bytes:
    try:
        with stores.archive.reading(answer.series_uid, [answer.sop_uid]) as (path,):
            hu = read_hu(path, answer.frame)
    except UndecodableSlice as error:
        raise SliceNotFound(f"slice {answer.slice} can no longer be read: {error}") from error
    picture = io.BytesIO()
    painted = overlay(apply_window(hu, window), answer.cells, full)
    Image.fromarray(painted).save(picture, "PNG")
    return picture.getvalue()
