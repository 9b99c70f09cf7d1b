"""SQL: jobs that callers watch, and how far what they are about has come."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import and_, func, select, union
from sqlalchemy.orm import Session, joinedload

from service.errors import BadQuery, JobNotFound
from service.storage.database import Database
from service.storage.exports import OPEN as EXPORT_OPEN
from service.storage.tables import EmbeddingRow, ExportRow, ExportSeriesRow, HeadRow, JobRow, JobSeriesRow, SeriesRow

SERIES_OPEN = ("received", "queued", "embedding", "embedded")  # until it can be searched
HEAD_OPEN = ("received", "queued", "training")

# Without the tables and reports of heads, which may be large.
ABOUT = (
    joinedload(JobRow.head).load_only(
        *(HeadRow.name, HeadRow.version, HeadRow.state, HeadRow.done, HeadRow.known, HeadRow.error, HeadRow.touched_at)
    ),
    joinedload(JobRow.export),
)


@dataclass
class Progress:
    """A job with the sums over its series; a training has none."""

    job: JobRow
    states: Counter[str] = field(default_factory=Counter)
    done: int = 0  # slices, of an upload
    known: int = 0
    touched_at: datetime | None = None  # when a series of an upload last changed


class Jobs:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, job_id: str) -> Progress:
        """Raises JobNotFound."""
        with self._database.read() as session:
            job = session.get(JobRow, job_id, options=ABOUT)
            if job is None:
                raise JobNotFound(f"no job {job_id}")
            return _progress(session, [job])[0]

    def series(self, job_id: str) -> list[tuple[EmbeddingRow, int]]:
        """The embeddings of an upload in the order of their UIDs, each with how many slices are in the archive."""
        query = _of_jobs(select(EmbeddingRow, SeriesRow.received), [job_id]).order_by(EmbeddingRow.series_uid)
        with self._database.read() as session:
            return [(row, received) for row, received in session.execute(query)]

    def list(self, *, kind: str | None, unfinished: bool, after: str | None, limit: int) -> list[Progress]:
        """The newest first, those that came before job `after`. Raises BadQuery where there is no such job."""
        query = select(JobRow).options(*ABOUT).order_by(JobRow.created_at.desc(), JobRow.job_id.desc()).limit(limit)
        export = select(ExportRow.job_id)
        if kind == "train":
            query = query.where(JobRow.head_id.is_not(None))
        elif kind == "export":
            query = query.where(JobRow.job_id.in_(export))
        elif kind == "embed":
            query = query.where(JobRow.head_id.is_(None), JobRow.job_id.not_in(export))
        if unfinished:
            query = query.where(JobRow.job_id.in_(_unfinished()))
        with self._database.read() as session:
            if after is not None:
                last = session.get(JobRow, after, options=ABOUT)
                if last is None:
                    raise BadQuery("the cursor is none, expected next_cursor of the page before")
                earlier = JobRow.created_at < last.created_at
                query = query.where(
                    JobRow.created_at <= last.created_at,  # the bound of the index; the next line is of ties
                    earlier | (JobRow.job_id < last.job_id),
                )
            return _progress(session, session.scalars(query).all())


def _unfinished() -> Any:
    """Ids of the jobs of which something has not come to its end; from what is open, which is less than all jobs."""
    mine = and_(JobSeriesRow.series_uid == EmbeddingRow.series_uid, JobSeriesRow.encoder_id == EmbeddingRow.encoder_id)
    series = select(JobSeriesRow.job_id).join(EmbeddingRow, mine).where(EmbeddingRow.state.in_(SERIES_OPEN))
    heads = select(JobRow.job_id).join(HeadRow, HeadRow.head_id == JobRow.head_id).where(HeadRow.state.in_(HEAD_OPEN))
    exports = select(ExportRow.job_id).where(ExportRow.state.in_(EXPORT_OPEN))
    return union(series, heads, exports)


def _progress(session: Session, jobs: Sequence[JobRow]) -> list[Progress]:
    """Two queries, however many jobs they are."""
    found = {job.job_id: Progress(job) for job in jobs}
    known = func.coalesce(func.nullif(EmbeddingRow.known, 0), SeriesRow.received)
    sums = (func.count(), func.sum(EmbeddingRow.done), func.sum(known), func.max(EmbeddingRow.touched_at))
    columns = (JobSeriesRow.job_id, EmbeddingRow.state)
    uploads = [job.job_id for job in jobs if job.head_id is None and job.export is None]
    for job_id, state, count, done, slices, touched_at in session.execute(
        _of_jobs(select(*columns, *sums), uploads).group_by(*columns)
    ):
        each = found[job_id]
        each.states[state] = count
        each.done += int(done)
        each.known += int(slices)
        each.touched_at = max(each.touched_at or touched_at, touched_at)
    states = _export_states(session, [job.export.export_id for job in jobs if job.export is not None])
    for each in found.values():
        if each.job.export is not None:
            each.states = states[each.job.export.export_id]
    return list(found.values())


def _export_states(session: Session, export_ids: Sequence[str]) -> dict[str, Counter[str]]:
    columns = (ExportSeriesRow.export_id, ExportSeriesRow.state)
    query = select(*columns, func.count()).where(ExportSeriesRow.export_id.in_(export_ids)).group_by(*columns)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for export_id, state, count in session.execute(query):
        found[export_id][state] = count
    return found


def _of_jobs(query: Any, job_ids: Sequence[str]) -> Any:
    mine = and_(JobSeriesRow.series_uid == EmbeddingRow.series_uid, JobSeriesRow.encoder_id == EmbeddingRow.encoder_id)
    return (
        query.select_from(JobSeriesRow)
        .join(EmbeddingRow, mine)
        .join(SeriesRow, SeriesRow.series_uid == EmbeddingRow.series_uid)
        .where(JobSeriesRow.job_id.in_(job_ids))
    )
