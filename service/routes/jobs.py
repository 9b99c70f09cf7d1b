"""Jobs: work that a caller can watch."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import APIRouter
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from service.deps import StoresDep, needs
from service.schemas.base import Text
from service.schemas.jobs import Job, JobSeries, JobState
from service.storage.stores import Stores
from service.storage.tables import ExportRow, HeadRow

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

POLL_SECONDS = 0.5
ENDED = ("done", "failed", "cancelled")


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
    job, embeddings, received = stores.catalog.job(job_id)
    if job.head is not None:
        return _training(job_id, job.head)
    if job.export is not None:
        return _exporting(job_id, job.export, stores.contents.states(job.export.export_id))
    series = [
        JobSeries(series_uid=uid, state=row.state, done=row.done, known=row.known or received[uid], error=row.error)
        for uid, row in embeddings.items()
    ]
    return Job(
        job_id=job_id,
        kind="embed",
        state=_overall([each.state for each in series], cancelled=job.cancelled_at is not None),
        created_at=job.created_at,
        done=sum(each.done for each in series),
        known=sum(each.known for each in series),
        unit="slices",
        states=Counter(each.state for each in series),
        series=series,
        head_id=None,
        export_id=None,
        error=None,
    )


def _training(job_id: str, head: HeadRow) -> Job:
    states: dict[str, JobState] = {
        "ready": "done",
        "failed": "failed",
        "cancelled": "cancelled",
        "training": "running",
    }
    return Job(
        job_id=job_id,
        kind="train",
        state=states.get(head.state, "waiting"),
        created_at=head.created_at,
        done=head.done,
        known=head.known,
        unit="epochs",
        states={},
        series=[],
        head_id=head.head_id,
        export_id=None,
        error=head.error,
    )


def _exporting(job_id: str, export: ExportRow, series_states: Counter[str]) -> Job:
    """Its series are in GET /v1/exports/{export_id}: they may be many.

    Its state is the export's: done once every series has come to its end, and `states` says how many of them failed;
    failed where it stopped before that.
    """
    states: dict[str, JobState] = {"done": "done", "failed": "failed", "cancelled": "cancelled", "running": "running"}
    return Job(
        job_id=job_id,
        kind="export",
        state=states.get(export.state, "waiting"),
        created_at=export.created_at,
        done=export.done,
        known=export.known,
        unit="series" if export.scanned_at else "files",
        states=series_states,
        series=[],
        head_id=None,
        export_id=export.export_id,
        error=export.error,
    )


def _overall(states: list[str], cancelled: bool) -> JobState:
    """Done when every series can be searched or was rejected; failed when one failed and none is open."""
    if all(state in ("indexed", "rejected", "failed") for state in states):
        if cancelled:
            return "cancelled"
        return "failed" if "failed" in states else "done"
    return "waiting" if all(state in ("received", "queued") for state in states) else "running"
