"""Jobs: work that a caller can watch."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from service.deps import StoresDep, needs
from service.schemas.base import Text
from service.schemas.jobs import Job, JobKind, JobPage, JobSeries, JobState, JobSummary
from service.storage.jobs import Progress
from service.storage.stores import Stores
from service.storage.tables import ExportRow, HeadRow, JobRow

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

POLL_SECONDS = 0.5
ENDED = ("done", "failed", "cancelled")


@router.get("", dependencies=[needs("read")])
def list_jobs(
    stores: StoresDep,
    kind: Annotated[JobKind | None, Query()] = None,
    unfinished: Annotated[bool, Query(description="only those that have not come to their end")] = False,
    cursor: Annotated[Text | None, Query(description="next_cursor of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
) -> JobPage:
    """Uploads, trainings and exports, the newest first."""
    found = stores.jobs.list(kind=kind, unfinished=unfinished, after=cursor, limit=limit + 1)
    page = [_summary(each) for each in found[:limit]]
    return JobPage(jobs=page, next_cursor=page[-1].job_id if len(found) > limit else None)


@router.get("/{job_id}", dependencies=[needs("read")])
def get_job(job_id: Text, stores: StoresDep) -> Job:
    """How far the work is: slices, epochs, files or series done of those known."""
    return _job(stores, job_id)


@router.get(
    "/{job_id}/events",
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "an event `job` per change, until the end"}},
    dependencies=[needs("read")],
)
async def get_events(job_id: Text, stores: StoresDep) -> EventSourceResponse:
    """The job as server-sent events, one per change, ending with the job."""
    first = await run_in_threadpool(_job, stores, job_id)

    async def events() -> AsyncIterator[ServerSentEvent]:
        job = first
        yield ServerSentEvent(job.model_dump_json(), event="job")
        while job.state not in ENDED:
            await asyncio.sleep(POLL_SECONDS)
            latest = await run_in_threadpool(_job, stores, job_id)
            if latest != job:
                yield ServerSentEvent(latest.model_dump_json(), event="job")
            job = latest

    return EventSourceResponse(events())


@router.post("/{job_id}/cancel", dependencies=[needs("write", "train")])
def cancel_job(job_id: Text, stores: StoresDep) -> Job:
    """Stop the work: a training for good, of an upload the series that no worker has begun, of an export the rest.

    Cancelled series are `failed` and begin anew when they are posted again. A job that has ended stays as it is.
    """
    stores.catalog.cancel(job_id)
    return _job(stores, job_id)


def _job(stores: Stores, job_id: str) -> Job:
    progress = stores.jobs.get(job_id)
    embeddings = [] if progress.job.head_id or progress.job.export else stores.jobs.series(job_id)
    series = [
        JobSeries(
            series_uid=row.series_uid, state=row.state, done=row.done, known=row.known or received, error=row.error
        )
        for row, received in embeddings
    ]
    return Job(**vars(_summary(progress)), series=series)


def _summary(progress: Progress) -> JobSummary:
    if progress.job.head is not None:
        return _training(progress.job, progress.job.head)
    if progress.job.export is not None:
        return _exporting(progress, progress.job.export)
    job_id, state = progress.job.job_id, _overall(progress)
    return JobSummary(
        job_id=job_id,
        kind="embed",
        state=state,
        created_at=progress.job.created_at,
        ended_at=(progress.touched_at or progress.job.created_at) if state in ENDED else None,
        done=progress.done,
        known=progress.known,
        unit="slices",
        states=progress.states,
        head_id=None,
        export_id=None,
        name=None,
        subject=f"/v1/jobs/{job_id}",
        error=None,
    )


def _training(job: JobRow, head: HeadRow) -> JobSummary:
    states: dict[str, JobState] = {
        "ready": "done",
        "failed": "failed",
        "cancelled": "cancelled",
        "training": "running",
    }
    state = states.get(head.state, "waiting")
    return JobSummary(
        job_id=job.job_id,
        kind="train",
        state=state,
        created_at=job.created_at,
        ended_at=head.touched_at if state in ENDED else None,
        done=head.done,
        known=head.known,
        unit="epochs",
        states={},
        head_id=head.head_id,
        export_id=None,
        name=f"{head.name}@{head.version}",
        subject=f"/v1/heads/{head.head_id}",
        error=head.error,
    )


def _exporting(progress: Progress, export: ExportRow) -> JobSummary:
    """Its series are in GET /v1/exports/{export_id}: they may be many. Done, even where some of them failed."""
    states: dict[str, JobState] = {"done": "done", "failed": "failed", "cancelled": "cancelled", "running": "running"}
    return JobSummary(
        job_id=export.job_id,
        kind="export",
        state=states.get(export.state, "waiting"),
        created_at=export.created_at,
        ended_at=export.ended_at,
        done=export.done,
        known=export.known,
        unit="series" if export.scanned_at else "files",
        states=progress.states,
        head_id=None,
        export_id=export.export_id,
        name=export.uri,
        subject=f"/v1/exports/{export.export_id}",
        error=export.error,
    )


def _overall(progress: Progress) -> JobState:
    """Done when every series can be searched or was rejected; failed when one failed and none is open."""
    states = set(progress.states)
    if states <= {"indexed", "rejected", "failed"}:
        if "failed" not in states:
            return "done"
        return "failed" if progress.job.cancelled_at is None else "cancelled"
    return "waiting" if states <= {"received", "queued"} else "running"
