"""DICOMweb out: WADO-RS, what was stored as files, metadata, frames and pictures (PS3.18 10.4)."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse

from service.deps import StoresDep, needs
from service.dicomweb.addresses import PREFIX, Addresses
from service.dicomweb.media import DICOM_JSON, JSON, Media, chosen
from service.dicomweb.multipart import Body, started
from service.dicomweb.render import middle, rendered, thumbnail
from service.dicomweb.retrieve import Kept, bulk_data, dicom_files, frames, instances, metadata
from service.routes.dicomweb import AcceptDep, AddressesDep
from service.schemas.dicomweb import DATASETS, FILES, OCTET_PARTS, PICTURE, Uid

STUDY = "/{study}"
SERIES = f"{STUDY}/series/{{series}}"
INSTANCE = f"{SERIES}/instances/{{instance}}"
FRAME = f"{INSTANCE}/frames/{{frame}}"

router = APIRouter(prefix=f"{PREFIX}/studies", tags=["DICOMweb"], dependencies=[needs("read")])

FrameNumber = Annotated[int, Path(ge=1, description="counted from 1")]
Window = Annotated[
    str | None, Query(description="`center,width,function` in HU, function linear, linear-exact or sigmoid; or a name")
]
Viewport = Annotated[
    str | None,
    Query(description="`width,height`, or `width,height,left,top,region width,region height`, a negative one flipped"),
]
Quality = Annotated[int | None, Query(ge=1, le=100, description="of a JPEG")]


@router.get(STUDY, responses=FILES, response_class=StreamingResponse)
def retrieve_study(study: Uid, stores: StoresDep, accept: AcceptDep, addresses: AddressesDep) -> Response:
    """All instances of a study."""
    return _streamed(dicom_files(instances(stores, study), accept, addresses))


@router.get(SERIES, responses=FILES, response_class=StreamingResponse)
def retrieve_series(study: Uid, series: Uid, stores: StoresDep, accept: AcceptDep, addresses: AddressesDep) -> Response:
    """All instances of a series."""
    return _streamed(dicom_files(instances(stores, study, series), accept, addresses))


@router.get(INSTANCE, responses=FILES, response_class=StreamingResponse)
def retrieve_instance(
    study: Uid, series: Uid, instance: Uid, stores: StoresDep, accept: AcceptDep, addresses: AddressesDep
) -> Response:
    """One instance; with `transfer-syntax=*` in Accept byte for byte as it came."""
    return _streamed(dicom_files(instances(stores, study, series, instance), accept, addresses))


@router.get(f"{STUDY}/metadata", responses=DATASETS, response_class=StreamingResponse)
def study_metadata(study: Uid, stores: StoresDep, accept: AcceptDep, addresses: AddressesDep) -> Response:
    """Every element of a study's instances, bulk data and pixels by their addresses."""
    return _metadata(instances(stores, study), accept, addresses)


@router.get(f"{SERIES}/metadata", responses=DATASETS, response_class=StreamingResponse)
def series_metadata(study: Uid, series: Uid, stores: StoresDep, accept: AcceptDep, addresses: AddressesDep) -> Response:
    """The same of a series."""
    return _metadata(instances(stores, study, series), accept, addresses)


@router.get(f"{INSTANCE}/metadata", responses=DATASETS, response_class=StreamingResponse)
def instance_metadata(
    study: Uid, series: Uid, instance: Uid, stores: StoresDep, accept: AcceptDep, addresses: AddressesDep
) -> Response:
    """The same of one instance."""
    return _metadata(instances(stores, study, series, instance), accept, addresses)


@router.get(f"{INSTANCE}/bulkdata/{{place:path}}", responses=OCTET_PARTS, response_class=StreamingResponse)
def retrieve_bulk_data(
    study: Uid,
    series: Uid,
    instance: Uid,
    place: str,
    stores: StoresDep,
    accept: AcceptDep,
    addresses: AddressesDep,
) -> Response:
    """A large binary value, at the address that the metadata names."""
    (kept,) = instances(stores, study, series, instance)
    return _streamed(bulk_data(kept, place, accept, addresses))


@router.get(f"{INSTANCE}/frames/{{frames}}", responses=OCTET_PARTS, response_class=StreamingResponse)
def retrieve_frames(
    study: Uid,
    series: Uid,
    instance: Uid,
    numbers: Annotated[str, Path(alias="frames", description="numbers from 1, between commas")],
    stores: StoresDep,
    accept: AcceptDep,
    addresses: AddressesDep,
) -> Response:
    """Pixels of frames: little endian, or compressed as stored where Accept names that transfer syntax or `*`."""
    (kept,) = instances(stores, study, series, instance)
    return _streamed(frames(kept, numbers, accept, addresses))


@router.get(f"{INSTANCE}/rendered", responses=PICTURE, response_class=Response)
def rendered_instance(
    study: Uid,
    series: Uid,
    instance: Uid,
    stores: StoresDep,
    accept: AcceptDep,
    window: Window = None,
    viewport: Viewport = None,
    quality: Quality = None,
) -> Response:
    """An instance as JPEG or PNG; of several frames, that in the middle."""
    (kept,) = instances(stores, study, series, instance)
    return _picture(rendered(kept, None, accept, window=window, viewport=viewport, quality=quality))


@router.get(f"{FRAME}/rendered", responses=PICTURE, response_class=Response)
def rendered_frame(
    study: Uid,
    series: Uid,
    instance: Uid,
    frame: FrameNumber,
    stores: StoresDep,
    accept: AcceptDep,
    window: Window = None,
    viewport: Viewport = None,
    quality: Quality = None,
) -> Response:
    """One frame as JPEG or PNG."""
    (kept,) = instances(stores, study, series, instance)
    return _picture(rendered(kept, frame, accept, window=window, viewport=viewport, quality=quality))


@router.get(f"{STUDY}/thumbnail", responses=PICTURE, response_class=Response)
def study_thumbnail(study: Uid, stores: StoresDep, accept: AcceptDep, viewport: Viewport = None) -> Response:
    """The middle slice of a study's first series, small."""
    return _picture(thumbnail(middle(instances(stores, study)), None, accept, viewport))


@router.get(f"{SERIES}/thumbnail", responses=PICTURE, response_class=Response)
def series_thumbnail(
    study: Uid, series: Uid, stores: StoresDep, accept: AcceptDep, viewport: Viewport = None
) -> Response:
    """A series' middle slice, small."""
    return _picture(thumbnail(middle(instances(stores, study, series)), None, accept, viewport))


@router.get(f"{INSTANCE}/thumbnail", responses=PICTURE, response_class=Response)
def instance_thumbnail(
    study: Uid, series: Uid, instance: Uid, stores: StoresDep, accept: AcceptDep, viewport: Viewport = None
) -> Response:
    """An instance, small."""
    (kept,) = instances(stores, study, series, instance)
    return _picture(thumbnail(kept, None, accept, viewport))


@router.get(f"{FRAME}/thumbnail", responses=PICTURE, response_class=Response)
def frame_thumbnail(
    study: Uid,
    series: Uid,
    instance: Uid,
    frame: FrameNumber,
    stores: StoresDep,
    accept: AcceptDep,
    viewport: Viewport = None,
) -> Response:
    """A frame, small."""
    (kept,) = instances(stores, study, series, instance)
    return _picture(thumbnail(kept, frame, accept, viewport))


def _metadata(kept: list[Kept], accept: str, addresses: Addresses) -> Response:
    media = chosen(accept, [Media(DICOM_JSON), Media(JSON)]).media.kind
    return _streamed(Body(media, started(metadata(kept, addresses))))


def _streamed(body: Body) -> Response:
    return StreamingResponse(body.chunks, media_type=body.content_type)


def _picture(made: tuple[bytes, str]) -> Response:
    content, kind = made
    return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=3600"})
