"""Series, jobs, embeddings, features and exports, each call once."""

import io
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, Unpack
from urllib.parse import quote

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from models.durable import replacing
from service.client.asked import Cohort, JobLike
from service.client.parts import Files, Progress, close, parts_of
from service.client.wire import Wire, ask, streamed
from service.errors import BadQuery, JobFailed, ServiceAway
from service.features.names import SUFFIXES, FormatName, format_of
from service.schemas.encoders import Encoder, Encoders
from service.schemas.erasures import Erasure
from service.schemas.exports import Export, ExportAccepted, ExportPage, ExportSummary
from service.schemas.jobs import Job
from service.schemas.pulls import PacsQuery
from service.schemas.search import TagList
from service.schemas.series import Series, SeriesPage, State, UploadReceived

if TYPE_CHECKING:
    import xarray

M = TypeVar("M", bound=BaseModel)

NPY, ARROW = "application/x-npy", "application/vnd.apache.arrow.stream"
PAGE = 1000
ENDED = ("done", "failed", "cancelled")
FIRST_SECONDS, LONGEST_SECONDS = 0.1, 1.0  # between two looks at a job
# An upload is unpacked and screened before its answer, an .h5ad is made whole before its first byte.
LONG = httpx.Timeout(10, read=3600, write=60)


async def request(
    wire: Wire, /, method: str, path: str, *, again: bool | None = None, **content: Any
) -> httpx.Response:
    """Any call of the API, as httpx.Client.request() takes it, with the errors of the others.

    Where it may be asked `again`, retries are as theirs; a GET may, unless said otherwise.
    """
    return await ask(wire, method, path, again=method.upper() == "GET" if again is None else again, **content)


async def upload(
    wire: Wire, files: Files, *, encoder: str | None = None, patient_id: str = "", progress: Progress | None = None
) -> UploadReceived:
    """Send DICOM files, NIfTI volumes (whose patient `patient_id` names), or zip or tar archives of them.

    A file, a folder with everything below it, or several of either. Sending the same again changes nothing, so what
    breaks off begins anew. `progress` is called with the bytes sent so far and in all.
    """
    parts = parts_of(files, progress)
    try:
        query = given(encoder=encoder, patient_id=patient_id or None)
        answer = await ask(wire, "POST", "/v1/series", again=True, params=query, files=parts, timeout=LONG)
    finally:
        close(parts)
    return parsed(wire, UploadReceived, answer)


async def complete(wire: Wire, series_uid: str) -> Series:
    """Say that a series that came by network is whole: it is embedded now, not after its quiet time."""
    return parsed(wire, Series, await ask(wire, "POST", at("series", series_uid, "complete"), again=True))


async def get_job(wire: Wire, job: JobLike) -> Job:
    """How far the work is."""
    return parsed(wire, Job, await ask(wire, "GET", at("jobs", job_id(job)), again=True))


async def wait(
    wire: Wire, job: JobLike, *, progress: Callable[[Job], object] | None = None, timeout: float | None = None
) -> Job:
    """The job when it has ended; takes its id, or what `upload`, `train` and `export` answer.

    `progress` is called with the job each time it is looked at. Raises JobFailed, whose `job` is the Job, where it
    failed or was cancelled; TimeoutError after `timeout` seconds, while the work goes on.
    """
    pause, end = FIRST_SECONDS, None if timeout is None else time.monotonic() + timeout
    while True:
        found = await get_job(wire, job)
        if progress:
            progress(found)
        if found.state == "done":
            return found
        if found.state in ENDED:
            raise JobFailed(_why(found), job=found)
        if end is not None and time.monotonic() + pause > end:
            raise TimeoutError(f"job {found.job_id} is {found.state} after {timeout} s")
        await wire.pause(pause)
        pause = min(pause * 1.5, LONGEST_SECONDS)


async def events(wire: Wire, job: JobLike) -> AsyncGenerator[Job, None]:
    """The job at each change until it ends, as the service sends it."""
    async with streamed(wire, at("jobs", job_id(job), "events")) as (_, pieces):
        buffer = b""
        async for piece in pieces:
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield Job.model_validate_json(line.removeprefix(b"data:"))


async def cancel(wire: Wire, job: JobLike) -> Job:
    """Stop the work: a training for good, of an upload or export what has not begun."""
    return parsed(wire, Job, await ask(wire, "POST", at("jobs", job_id(job), "cancel"), again=True))


async def series(
    wire: Wire, *, patient_id: str | None = None, study_uid: str | None = None, state: State | None = None
) -> AsyncGenerator[Series, None]:
    """Every series, or those that fit, in the order of their UIDs; asked for page by page."""
    query = given(patient_id=patient_id, study_uid=study_uid, state=state)
    async for page in pages(wire, SeriesPage, at("series"), query):
        for each in page.series:
            yield each


async def get_series(wire: Wire, series_uid: str) -> Series:
    """State, verdict, geometry, and which embeddings there are."""
    return parsed(wire, Series, await ask(wire, "GET", at("series", series_uid), again=True))


async def tags(wire: Wire, series_uid: str) -> list[str]:
    """The series' tags."""
    return parsed(wire, TagList, await ask(wire, "GET", at("series", series_uid, "tags"), again=True)).tags


async def set_tags(wire: Wire, series_uid: str, tags: list[str]) -> list[str]:
    """Give the series these tags and no others."""
    answer = await ask(wire, "PUT", at("series", series_uid, "tags"), again=True, json={"tags": tags})
    return parsed(wire, TagList, answer).tags


async def erase_series(wire: Wire, series_uid: str) -> Erasure:
    """Erase a series from every store, for good; the answer is the receipt. Not tried again: it has no second one."""
    return parsed(wire, Erasure, await ask(wire, "DELETE", at("series", series_uid), again=False))


async def erase_patient(wire: Wire, patient_id: str) -> Erasure:
    """Erase a patient with every series, as erase_series() does."""
    return parsed(wire, Erasure, await ask(wire, "DELETE", at("patients", patient_id), again=False))


async def embeddings(
    wire: Wire, series_uid: str, *, encoder: str | None = None, window: str | None = None
) -> NDArray[np.float16]:
    """(slices, windows, dim), feet to head; of one window where it is named."""
    query, path = given(encoder=encoder, window=window), at("series", series_uid, "embeddings")
    answer = await ask(wire, "GET", path, again=True, params=query, headers={"Accept": NPY})
    found: NDArray[np.float16] = np.load(io.BytesIO(answer.content), allow_pickle=False)
    return found


async def embeddings_xarray(
    wire: Wire, series_uid: str, *, encoder: str | None = None, window: str | None = None
) -> "xarray.DataArray":
    """The same with coordinates: slice, z_mm and sop_uid along `slice`, names along `window`; the receipt in `attrs`.

    Needs xarray, which the extra `xarray` installs.
    """
    import pyarrow as pa
    import xarray

    query, path = given(encoder=encoder, window=window), at("series", series_uid, "embeddings")
    answer = await ask(wire, "GET", path, again=True, params=query, headers={"Accept": ARROW})
    table = pa.ipc.open_stream(answer.content).read_all()
    about = json.loads(table.schema.metadata[b"keyslice"])
    count = len(about["windows"])
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, count, about["dim"])
    places = table.select(["slice", "z_mm", "sop_uid"]).to_pydict()
    return xarray.DataArray(
        vectors,
        dims=("slice", "window", "dim"),
        coords={
            "window": about["windows"],
            **{name: ("slice", values[::count]) for name, values in places.items()},
        },
        name="embeddings",
        attrs={
            "series_uid": series_uid,
            "encoder_id": about["encoder_id"],
            "receipt": json.loads(table["receipt"][0].as_py()),
        },
    )


async def features(
    wire: Wire,
    path: str | Path,
    *,
    format: FormatName | None = None,
    progress: Callable[[int], object] | None = None,
    **cohort: Unpack[Cohort],
) -> dict[str, Any]:
    """Write a cohort's embeddings with their receipts to `path`: all of it, or nothing. docs/features.md.

    `progress` is called with the bytes so far. Answers what was written.
    """
    target = Path(path)
    form = format or format_of(target)
    if form is None:
        raise BadQuery(f"{target.name} says no format, expected one of {', '.join(SUFFIXES)}")
    query = {**cohort, "format": form}
    with replacing(target) as file:
        async with streamed(wire, "/v1/features", params=query, timeout=LONG) as (answer, pieces):
            async for piece in pieces:
                file.write(piece)
                if progress:
                    progress(file.tell())
        size, said = file.tell(), answer.headers
    return {
        "path": str(target),
        "bytes": size,
        "encoder_id": said["X-Keyslice-Encoder"],
        "windows": said["X-Keyslice-Windows"].split(","),
        "series": int(said["X-Keyslice-Series"]),
        "slices": int(said["X-Keyslice-Slices"]),
    }


async def export(
    wire: Wire,
    uri: str,
    *,
    encoder: str | None = None,
    dry_run: bool = False,
    query: PacsQuery | Mapping[str, str] | None = None,
    queries: str | None = None,
) -> ExportAccepted:
    """Embed a PACS export that the service can read; one of the same that has not ended goes on. docs/exports.md."""
    body = given(uri=uri, encoder=encoder, query=plain(query), queries=queries) | {"dry_run": dry_run}
    return parsed(wire, ExportAccepted, await ask(wire, "POST", at("exports"), again=False, json=body))


async def exports(wire: Wire) -> AsyncGenerator[ExportSummary, None]:
    """Every export, in the order of their ids."""
    async for page in pages(wire, ExportPage, at("exports"), {}):
        for each in page.exports:
            yield each


async def get_export(wire: Wire, export_id: str) -> Export:
    """How far an export is, and what became of each of its series."""
    whole: Export | None = None
    async for page in pages(wire, Export, at("exports", export_id), {}):
        before = whole.series if whole else []
        whole = page.model_copy(update={"series": before + page.series})
    assert whole is not None  # there is a first page
    return whole


async def export_table(wire: Wire, export_id: str, path: str | Path) -> None:
    """Write what became of each series of an export as CSV."""
    with replacing(Path(path)) as file:
        async with streamed(wire, at("exports", export_id, "table.csv"), timeout=LONG) as (_, pieces):
            async for piece in pieces:
                file.write(piece)


async def encoders(wire: Wire) -> list[Encoder]:
    """Every encoder, its id, licence, windows, and whether its weights are there."""
    return parsed(wire, Encoders, await ask(wire, "GET", at("encoders"), again=True)).encoders


async def pages(wire: Wire, schema: type[M], path: str, query: Mapping[str, Any]) -> AsyncGenerator[M, None]:
    """Every page of a list."""
    cursor: dict[str, str] = {}
    while True:
        answer = await ask(wire, "GET", path, again=True, params={**query, "limit": PAGE, **cursor})
        page = parsed(wire, schema, answer)
        yield page
        following: str | None = getattr(page, "next_cursor")  # noqa: B009  every page has one
        if following is None:
            return
        cursor = {"cursor": following}


def parsed(wire: Wire, schema: type[M], answer: httpx.Response) -> M:
    try:
        return schema.model_validate_json(answer.content)
    except ValidationError as error:
        raise ServiceAway(f"what answers at {wire.address} is no Keyslice service of this version") from error


def at(*names: str) -> str:
    """The path of what the names say."""
    return "/v1/" + "/".join(quote(name, safe="") for name in names)


def given(**values: Any) -> dict[str, Any]:
    """Those that are."""
    return {name: value for name, value in values.items() if value is not None}


def plain(value: Any) -> Any:
    """As JSON has it; of a schema what was set."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    return value


def job_id(job: JobLike) -> str:
    return job if isinstance(job, str) else job.job_id


def _why(job: Job) -> str:
    reasons = [f"series {each.series_uid}: {each.error}" for each in job.series if each.error]
    return f"job {job.job_id} {job.state}: {job.error or '; '.join(reasons[:5]) or 'on request'}"
