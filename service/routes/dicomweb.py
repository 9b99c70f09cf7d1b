"""DICOMweb in: STOW-RS to store, QIDO-RS to search (PS3.18 10.5 and 10.6)."""

import json
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.concurrency import contextmanager_in_threadpool
from starlette.concurrency import run_in_threadpool

from service.audited import Shown
from service.deps import EncoderNames, EncodersDep, RoomDep, SettingsDep, ShownDep, StoresDep, needs
from service.dicomweb.addresses import PREFIX, Addresses
from service.dicomweb.attributes import Level
from service.dicomweb.media import DICOM_JSON, JSON, Media, chosen
from service.dicomweb.query import MOST_RESULTS, Item, parse_query, search
from service.dicomweb.store import receive_instances, store, store_response
from service.disk import Room
from service.schemas.dicomweb import FOUND, OF_SERIES, OF_STUDY, STORE_BODY, STORED, Uid, search_parameters
from service.settings import Settings
from service.storage.staging import staging
from service.storage.stores import Stores

router = APIRouter(prefix=PREFIX, tags=["DICOMweb"])

STUDY, SERIES = "0020000D", "0020000E"  # StudyInstanceUID, SeriesInstanceUID

NOT_FUZZY = "The fuzzymatching parameter is not supported. Only literal matching has been performed."
TOO_MANY = "The number of results exceeded the maximum supported by the server. Additional results can be requested."


def accepted(
    accept: Annotated[str, Header()] = "*/*",
    instead: Annotated[str | None, Query(alias="accept", description="instead of the header (PS3.18 8.3.3)")] = None,
) -> str:
    return instead or accept


def addresses(request: Request, settings: SettingsDep) -> Addresses:
    """As the setting says, or as the request does."""
    if settings.public_url:
        return Addresses(settings.public_url.rstrip("/"))
    root = request.base_url
    server, port = request.scope["server"]
    if root.port is None and root.hostname in (server, "localhost"):
        root = root.replace(port=port)  # dicomweb-client sends a Host without its port
    return Addresses(str(root).rstrip("/"))


AcceptDep = Annotated[str, Depends(accepted)]
AddressesDep = Annotated[Addresses, Depends(addresses)]


class Search:
    """What every search takes beside attributes, and how it is answered."""

    def __init__(
        self,
        request: Request,
        stores: StoresDep,
        accept: AcceptDep,
        addresses: AddressesDep,
        shown: ShownDep,
        limit: Annotated[int | None, Query(ge=0, description=f"at most {MOST_RESULTS}")] = None,
        offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
        includefield: Annotated[
            list[str], Query(description="attributes to answer besides, between commas, or `all`")
        ] = [],  # noqa: B006  FastAPI copies it
        fuzzymatching: Annotated[bool, Query(description="not supported: names match literally, in any case")] = False,
    ) -> None:
        self._parameters = request.query_params.multi_items()
        self._stores, self._addresses, self._accept, self._shown = stores, addresses, accept, shown
        self._include, self._limit, self._offset, self._fuzzy = includefield, limit, offset, fuzzymatching

    def answer(self, level: Level, **within: str) -> Response:
        media = chosen(self._accept, [Media(DICOM_JSON), Media(JSON)]).media.kind
        query = parse_query(level, self._parameters, self._include, self._limit, self._offset, **within)
        results = search(query, self._stores, self._addresses)
        if level == "study":
            self._shown.studies(_uids(results.items, STUDY))
        else:
            self._shown.series(_uids(results.items, SERIES))
        warnings = [NOT_FUZZY] if self._fuzzy else []
        if results.more and query.limit == MOST_RESULTS:
            warnings.append(TOO_MANY)
        headers = {"Warning": ", ".join(f'299 keyslice: "{each}"' for each in warnings)} if warnings else {}
        if not results.items:
            return Response(status_code=204, headers=headers)
        return Response(json.dumps(results.items), media_type=media, headers=headers)


SearchDep = Annotated[Search, Depends()]


def _uids(items: Sequence[Item], tag: str) -> list[str]:
    return [item[tag]["Value"][0] for item in items]


@router.post(
    "/studies", responses=STORED, response_class=Response, openapi_extra=STORE_BODY, dependencies=[needs("write")]
)
async def store_instances(
    request: Request,
    stores: StoresDep,
    settings: SettingsDep,
    encoders: EncodersDep,
    accept: AcceptDep,
    addresses: AddressesDep,
    room: RoomDep,
    shown: ShownDep,
) -> Response:
    """STOW-RS: store slices of any study. Their series are embedded once they are whole."""
    return await _stored(request, None, stores, settings, encoders, accept, addresses, room, shown)


@router.post(
    "/studies/{study}",
    responses=STORED,
    response_class=Response,
    openapi_extra=STORE_BODY,
    dependencies=[needs("write")],
)
async def store_instances_of_study(
    request: Request,
    study: Uid,
    stores: StoresDep,
    settings: SettingsDep,
    encoders: EncodersDep,
    accept: AcceptDep,
    addresses: AddressesDep,
    room: RoomDep,
    shown: ShownDep,
) -> Response:
    """STOW-RS: store slices of one study; those of another are refused."""
    return await _stored(request, study, stores, settings, encoders, accept, addresses, room, shown)


@router.get(
    "/studies",
    responses=FOUND,
    response_class=Response,
    openapi_extra=search_parameters(*OF_STUDY),
    dependencies=[needs("read")],
)
def search_studies(search: SearchDep) -> Response:
    """QIDO-RS: studies, the latest first."""
    return search.answer("study")


@router.get(
    "/series",
    responses=FOUND,
    response_class=Response,
    openapi_extra=search_parameters(*OF_STUDY, *OF_SERIES),
    dependencies=[needs("read")],
)
def search_series(search: SearchDep) -> Response:
    """QIDO-RS: series of all studies."""
    return search.answer("series")


@router.get(
    "/studies/{study}/series",
    responses=FOUND,
    response_class=Response,
    openapi_extra=search_parameters(*OF_SERIES),
    dependencies=[needs("read")],
)
def search_series_of_study(study: Uid, search: SearchDep) -> Response:
    """QIDO-RS: a study's series."""
    return search.answer("series", StudyInstanceUID=study)


@router.get(
    "/instances",
    responses=FOUND,
    response_class=Response,
    openapi_extra=search_parameters("SOPInstanceUID"),
    dependencies=[needs("read")],
)
def search_instances(search: SearchDep) -> Response:
    """QIDO-RS: instances of all studies."""
    return search.answer("instance")


@router.get(
    "/studies/{study}/instances",
    responses=FOUND,
    response_class=Response,
    openapi_extra=search_parameters("SOPInstanceUID"),
    dependencies=[needs("read")],
)
def search_instances_of_study(study: Uid, search: SearchDep) -> Response:
    """QIDO-RS: a study's instances."""
    return search.answer("instance", StudyInstanceUID=study)


@router.get(
    "/studies/{study}/series/{series}/instances",
    responses=FOUND,
    response_class=Response,
    openapi_extra=search_parameters("SOPInstanceUID"),
    dependencies=[needs("read")],
)
def search_instances_of_series(study: Uid, series: Uid, search: SearchDep) -> Response:
    """QIDO-RS: a series' instances."""
    return search.answer("instance", StudyInstanceUID=study, SeriesInstanceUID=series)


async def _stored(
    request: Request,
    study: str | None,
    stores: Stores,
    settings: Settings,
    encoders: EncoderNames,
    accept: str,
    addresses: Addresses,
    room: Room,
    shown: Shown,
) -> Response:
    media = chosen(accept, [Media(DICOM_JSON), Media(JSON)]).media.kind  # before a body is taken that has no answer
    encoder_id = await run_in_threadpool(encoders.id, None)
    async with contextmanager_in_threadpool(staging(settings.staging_dir)) as folder:
        files = await receive_instances(
            request.stream(),
            request.headers.get("content-type", ""),
            folder,
            room,
            max_files=settings.max_upload_files,
        )
        sender = request.state.caller.name
        outcome = await run_in_threadpool(store, files, study, encoder_id, stores, settings, sender)
    shown.series(instance.stored_as[1] for instance, failure in outcome.instances if failure is None)
    return Response(json.dumps(store_response(outcome, addresses)), outcome.status, media_type=media)
