"""SQL: exports, who works on them and how far they are."""

import uuid
from collections.abc import Mapping, Sequence, Set
from typing import Any
from urllib.parse import unquote

from sqlalchemy import String, cast, delete, select, update
from sqlalchemy.orm import Session

from service.errors import ExportNotFound
from service.storage.database import Database
from service.storage.tables import ExportFileRow, ExportRow, ExportSeriesRow, JobRow, now
from service.storage.work import MOST_WAITING, lost, require_room, taken_on

ERASED = "erased:"  # instead of a URI
OPEN = ("received", "queued", "running")


class Exports:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, uri: str, encoder_id: str, options: dict[str, Any]) -> tuple[ExportRow, bool]:
        """An export to be embedded, and whether it is an earlier one of the same that had not come to its end.

        One that was scanned and then failed goes on where it was.
        """
        same = select(ExportRow).where(ExportRow.uri == uri, ExportRow.encoder_id == encoder_id)
        with self._database.write() as session:
            for row in session.scalars(same.order_by(ExportRow.created_at.desc()).with_for_update()):
                if row.options == options and (row.state in OPEN or (row.state == "failed" and row.scanned_at)):
                    if row.state == "failed":
                        row.state, row.attempts, row.error, row.ended_at = "received", 0, None, None
                    return row, True
            require_room(session, ExportRow, MOST_WAITING)
            job_id = uuid.uuid4().hex
            session.add(JobRow(job_id=job_id))
            session.flush()
            row = ExportRow(export_id=uuid.uuid4().hex[:12], job_id=job_id, uri=uri, encoder_id=encoder_id)
            row.options, row.state = options, "received"
            session.add(row)
            return row, False

    def get(self, export_id: str) -> ExportRow:
        with self._database.read() as session:
            row = session.get(ExportRow, export_id)
        if row is None:
            raise ExportNotFound(f"no export {export_id}")
        return row

    def sent(self, export_id: str) -> None:
        with self._database.write() as session:
            rows = update(ExportRow).where(ExportRow.export_id == export_id, ExportRow.state == "received")
            session.execute(rows.values(state="queued", touched_at=now()))

    def lost(self, stale_seconds: float, queue_is_empty: bool) -> list[str]:
        """Exports whose worker fell silent or whose message is gone; they are waiting again."""
        with self._database.write() as session:
            return [row.export_id for row in lost(session, ExportRow, "running", stale_seconds, queue_is_empty)]

    def claim(self, export_id: str, holder: str, stale_seconds: float, max_attempts: int) -> bool:
        """Take an export on; False where it has ended, is given up, or in a living worker's hands."""
        with self._database.write() as session:
            row = session.get(ExportRow, export_id, with_for_update=True)
            return row is not None and taken_on(row, "running", holder, stale_seconds, max_attempts)

    def touch(self, export_id: str, holder: str) -> bool:
        """The sign that the worker lives. False where the export was cancelled, or is in other hands."""
        with self._database.note() as session:
            return touch(session, export_id, holder)

    def explain(self, export_id: str, holder: str, error: str | None) -> None:
        """Why a running export does not go on just now; None where it does. Waiting is no attempt."""
        with self._database.note() as session:
            touch(session, export_id, holder, error=error, attempts=0)

    def finish(self, export_id: str, holder: str) -> None:
        """Every series has come to its end."""
        self._end(export_id, holder, "done", None)

    def fail(self, export_id: str, holder: str, error: str) -> None:
        self._end(export_id, holder, "failed", error)

    def release(self, export_id: str, holder: str, error: str | None = None) -> None:
        """Hand an export back, to be taken up where it is."""
        with self._database.write() as session:
            rows = _held(export_id, holder).values(state="received", holder=None, error=error, touched_at=now())
            session.execute(rows if error else rows.values(attempts=0))  # a worker that ends in peace is no attempt

    def list(self, *, after: str | None, limit: int) -> list[ExportRow]:
        """In the order of their ids, those behind `after`."""
        query = select(ExportRow).order_by(ExportRow.export_id).limit(limit)
        if after is not None:
            query = query.where(ExportRow.export_id > after)
        with self._database.read() as session:
            return [*session.scalars(query)]

    def _end(self, export_id: str, holder: str, state: str, error: str | None) -> None:
        with self._database.write() as session:
            session.execute(_held(export_id, holder).values(state=state, holder=None, error=error, ended_at=now()))


def touch(session: Session, export_id: str, holder: str, **values: Any) -> bool:
    """Within a transaction: the export is still this holder's, and these columns of it are set."""
    answer = session.execute(_held(export_id, holder).values(touched_at=now(), **values))
    return bool(answer.rowcount)  # type: ignore[attr-defined]


def cancel(session: Session, row: ExportRow) -> bool:
    """No further series is begun; those that workers have are embedded all the same. False where it has ended."""
    if row.state not in OPEN:
        return False
    row.state, row.holder, row.ended_at = "cancelled", None, now()
    unfinished = ExportSeriesRow.state.in_(("waiting", "embedding"))
    rows = update(ExportSeriesRow).where(ExportSeriesRow.export_id == row.export_id, unfinished)
    session.execute(rows.values(state="cancelled"))
    return True


def forget(session: Session, series_uids: Sequence[str], patient_ids: Sequence[str]) -> None:
    """Before the rows of these series go: what their exports hold that may name the patient beside them.

    That is the names of files of no series, and a URI with a patient's id; an export that has one ends.
    """
    theirs = select(ExportSeriesRow.export_id).where(ExportSeriesRow.series_uid.in_(series_uids)).distinct()
    for export_id in session.scalars(theirs).all():
        strays = ExportFileRow.export_id == export_id, ExportFileRow.series_uid == ""
        session.execute(delete(ExportFileRow).where(*strays))
        row = session.get_one(ExportRow, export_id, with_for_update=True)
        if any(patient_id in unquote(row.uri) for patient_id in patient_ids):
            cancel(session, row)
            row.uri = ERASED


def forget_queries(session: Session, asked: Mapping[str, Set[str]]) -> None:
    """Queries to servers, of any export, that ask for one of these values of a field, with wildcards around it or
    without: they go, and an export that has one ends."""
    pulled = select(ExportRow.export_id).where(cast(ExportRow.options, String).contains('"queries"'))
    for export_id in session.scalars(pulled).all():
        row = session.get_one(ExportRow, export_id, with_for_update=True)
        kept = [query for query in row.options["queries"] if not _asks(query, asked)]
        if len(kept) < len(row.options["queries"]):
            cancel(session, row)
            row.options = row.options | {"queries": kept}


def _asks(query: Mapping[str, str], asked: Mapping[str, Set[str]]) -> bool:
    return any(query.get(field, "").strip("*?") in values for field, values in asked.items())


def _held(export_id: str, holder: str) -> Any:
    mine = (ExportRow.export_id == export_id, ExportRow.holder == holder, ExportRow.state == "running")
    return update(ExportRow).where(*mine)
