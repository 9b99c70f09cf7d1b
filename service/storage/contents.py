"""SQL: the files of an export, its series, and what became of them."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import and_, case, delete, func, insert, literal, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.storage.database import Database
from service.storage.exports import touch
from service.storage.files import ExportFile
from service.storage.tables import EmbeddingRow, ExportFileRow, ExportRow, ExportSeriesRow, SeriesRow, now

ENDS = {"embedded": "embedded", "indexed": "embedded", "rejected": "rejected", "failed": "failed"}
PAGE = 500  # rows at a time, where all of them may be many
TRIMMED_AT_ONCE = 5000  # rows that leave in one transaction: everybody else who writes waits for it


class NotHeld(Exception):
    """The export was cancelled, or another worker has taken it over."""


class ExportContents:
    def __init__(self, database: Database) -> None:
        self._database = database

    def unrecorded(self, export_id: str, files: Sequence[ExportFile]) -> list[ExportFile]:
        """Those of the files, of whatever number, that no earlier scan has recorded."""
        keys = {file.key(): file for file in files}
        here = select(ExportFileRow.file_key).where(ExportFileRow.export_id == export_id)
        with self._database.read() as session:
            known = set(session.scalars(here.where(ExportFileRow.file_key.in_(keys))))
        return [file for key, file in keys.items() if key not in known]

    def record(self, export_id: str, holder: str, files: Sequence[ExportFile]) -> None:
        """Note identified files. A power cut may take them back: they are read again. Raises NotHeld."""
        try:
            self._record(export_id, holder, files)
        except IntegrityError:  # a folder that changes while it is listed may give a name twice
            self._record(export_id, holder, self.unrecorded(export_id, files))

    def _record(self, export_id: str, holder: str, files: Sequence[ExportFile]) -> None:
        with self._database.note() as session:
            if not touch(session, export_id, holder, done=ExportRow.done + len(files), attempts=0):
                raise NotHeld
            if files:
                rows = [file._asdict() | {"export_id": export_id, "file_key": file.key()} for file in files]
                session.execute(insert(ExportFileRow.__table__), rows)  # type: ignore[arg-type]

    def scanned(self, export_id: str, holder: str, *, dry_run: bool) -> None:
        """Every file is recorded: note their series, whose outcome is open unless none of their files is usable."""
        usable = func.count(case((ExportFileRow.reason.is_(None), 1)))
        state = case((usable == 0, "set_aside"), else_="found" if dry_run else "waiting")
        groups = select(literal(export_id), ExportFileRow.series_uid, state, func.count())
        groups = groups.where(ExportFileRow.export_id == export_id, ExportFileRow.series_uid != "")
        columns = ("export_id", "series_uid", "state", "files")
        with self._database.write() as session:
            session.execute(insert(ExportSeriesRow).from_select(columns, groups.group_by(ExportFileRow.series_uid)))
            states = _count_states(session, export_id)
            done, known = states["set_aside"], states.total()
            files, size = _count_files(session, export_id)
            counted = {"scanned_at": now(), "done": done, "known": known, "files": files, "bytes": size}
            if not touch(session, export_id, holder, **counted):
                raise NotHeld

    def next_series(self, export_id: str) -> str | None:
        """The first series, in the order of their UIDs, that nothing has been done for."""
        waiting = _series(export_id).where(ExportSeriesRow.state == "waiting").order_by(ExportSeriesRow.series_uid)
        with self._database.read() as session:
            row = session.scalar(waiting.limit(1))
            return row.series_uid if row else None

    def usable_files(self, export_id: str, series_uid: str) -> list[ExportFile]:
        """Of a series that has not been handed over."""
        query = select(ExportFileRow).where(*_used(export_id), ExportFileRow.series_uid == series_uid)
        with self._database.read() as session:
            rows = session.scalars(query.order_by(ExportFileRow.file_key))
            return [ExportFile(row.name, row.size, row.place, row.series_uid) for row in rows]

    def handed_over(
        self,
        export_id: str,
        holder: str,
        series_uid: str,
        started_at: datetime,
        set_aside: Sequence[ExportFile],
        state: str,
        error: str | None = None,
    ) -> None:
        """The usable files are archived and their embedding is asked for, or the series has come to its end with this
        state; and why other files are not used. Rows of files that are have served. Raises NotHeld."""
        with self._database.write() as session:
            for file in set_aside:
                mine = and_(ExportFileRow.export_id == export_id, ExportFileRow.file_key == file.key())
                session.execute(update(ExportFileRow).where(mine).values(reason=file.reason, detail=file.detail))
            session.execute(delete(ExportFileRow).where(*_used(export_id), ExportFileRow.series_uid == series_uid))
            row = session.get(ExportSeriesRow, (export_id, series_uid))
            if row:  # else it was erased meanwhile
                row.state, row.error, row.started_at = state, error, started_at
            if not touch(session, export_id, holder, done=ExportRow.done + int(state != "embedding"), attempts=0):
                raise NotHeld

    def settle(self, export_id: str, holder: str) -> int:
        """Note the outcome of series whose embedding has ended; how many are still on their way. Raises NotHeld."""
        with self._database.write() as session:
            encoder_id = session.get_one(ExportRow, export_id).encoder_id
            rows = [*session.scalars(_series(export_id).where(ExportSeriesRow.state == "embedding"))]
            ended = [row for row in rows if _settled(session, row, encoder_id)]
            if not touch(
                session, export_id, holder, done=ExportRow.done + len(ended), **({"attempts": 0} if ended else {})
            ):
                raise NotHeld
            return len(rows) - len(ended)

    def states(self, export_id: str) -> Counter[str]:
        """How many series are in each state."""
        with self._database.read() as session:
            return _count_states(session, export_id)

    def totals(self, export_id: str) -> tuple[int, int, int]:
        """Files, bytes, and slices in embeddings."""
        slices = select(func.coalesce(func.sum(ExportSeriesRow.slices), 0))
        with self._database.read() as session:
            files, size = _counted(session, session.get_one(ExportRow, export_id))
            embedded = session.scalar(slices.where(ExportSeriesRow.export_id == export_id))
            return files, size, int(embedded or 0)

    def trim(self) -> None:
        """Remove rows of used files of an export that has ended; what is too much at once, the next call removes.

        One that failed after its scan may go on, and keeps them.
        """
        in_its_scan = and_(ExportRow.state == "failed", ExportRow.scanned_at.is_(None))
        ended = or_(ExportRow.state.in_(("done", "cancelled")), in_its_scan)
        due = select(ExportRow).where(ended, ExportRow.trimmed.is_(False)).limit(1)
        with self._database.read() as session:
            row = session.scalar(due)
            if row is None:
                return
            files, size = _counted(session, row)
            used = select(ExportFileRow.file_key).where(*_used(row.export_id)).limit(TRIMMED_AT_ONCE)
            keys = session.scalars(used).all()
        counted = {"files": func.coalesce(ExportRow.files, files), "bytes": func.coalesce(ExportRow.bytes, size)}
        trimmed = len(keys) < TRIMMED_AT_ONCE
        mine = ExportFileRow.export_id == row.export_id, ExportFileRow.file_key.in_(keys)
        with self._database.write() as session:
            session.execute(delete(ExportFileRow).where(*mine))
            changed = update(ExportRow).where(ExportRow.export_id == row.export_id)
            session.execute(changed.values(**counted, trimmed=trimmed))

    def series(
        self, export_id: str, *, state: str | None = None, after: str | None = None, limit: int = PAGE
    ) -> list[ExportSeriesRow]:
        """In the order of their UIDs, those behind `after`."""
        query = _series(export_id).order_by(ExportSeriesRow.series_uid).limit(limit)
        if state is not None:
            query = query.where(ExportSeriesRow.state == state)
        if after is not None:
            query = query.where(ExportSeriesRow.series_uid > after)
        with self._database.read() as session:
            return [*session.scalars(query)]

    def reasons(self, export_id: str, series_uids: Sequence[str]) -> dict[str, Counter[str]]:
        """By series, how many of its files were set aside for which reason."""
        columns = (ExportFileRow.series_uid, ExportFileRow.reason)
        aside = _aside(export_id, *columns, func.count()).where(ExportFileRow.series_uid.in_(series_uids))
        found: dict[str, Counter[str]] = defaultdict(Counter)
        with self._database.read() as session:
            for uid, reason, count in session.execute(aside.group_by(*columns)):
                found[uid][reason] = count
        return found

    def all_reasons(self, export_id: str) -> dict[str, int]:
        """How many files of the export were set aside for which reason."""
        aside = _aside(export_id, ExportFileRow.reason, func.count()).group_by(ExportFileRow.reason)
        with self._database.read() as session:
            return dict(session.execute(aside).all())

    def files_aside(
        self, export_id: str, *, series_uid: str | None, after: bytes | None, limit: int
    ) -> list[ExportFileRow]:
        """Files that are not used, those behind the key `after`."""
        query = _aside(export_id, ExportFileRow)
        if series_uid is not None:
            query = query.where(ExportFileRow.series_uid == series_uid)
        if after is not None:
            query = query.where(ExportFileRow.file_key > after)
        with self._database.read() as session:
            return [*session.scalars(query.order_by(ExportFileRow.file_key).limit(limit))]

    def every_series(self, export_id: str) -> Iterator[tuple[ExportSeriesRow, Counter[str]]]:
        """Each series with the reasons of its files, however many they are."""
        after = ""
        while rows := self.series(export_id, after=after):
            reasons = self.reasons(export_id, [row.series_uid for row in rows])
            yield from ((row, reasons[row.series_uid]) for row in rows)
            after = rows[-1].series_uid


def _series(export_id: str) -> Any:
    return select(ExportSeriesRow).where(ExportSeriesRow.export_id == export_id)


def _used(export_id: str) -> tuple[Any, ...]:
    return ExportFileRow.export_id == export_id, ExportFileRow.reason.is_(None)


def _counted(session: Session, row: ExportRow) -> tuple[int, int]:
    """Files and bytes of an export."""
    if row.files is None or row.bytes is None:
        return _count_files(session, row.export_id)
    return row.files, row.bytes


def _count_files(session: Session, export_id: str) -> tuple[int, int]:
    query = select(func.count(), func.coalesce(func.sum(ExportFileRow.size), 0))
    files, size = session.execute(query.where(ExportFileRow.export_id == export_id)).one()
    return int(files), int(size)


def _aside(export_id: str, *columns: Any) -> Any:
    return select(*columns).where(ExportFileRow.export_id == export_id, ExportFileRow.reason.is_not(None))


def _count_states(session: Session, export_id: str) -> Counter[str]:
    query = select(ExportSeriesRow.state, func.count()).where(ExportSeriesRow.export_id == export_id)
    return Counter(dict(session.execute(query.group_by(ExportSeriesRow.state)).all()))


def _settled(session: Session, row: ExportSeriesRow, encoder_id: str) -> bool:
    embedding = session.get(EmbeddingRow, (row.series_uid, encoder_id))
    if embedding is not None and embedding.state not in ENDS:
        return False
    moment = now()
    if embedding is None:
        row.state, row.error = "failed", "the series was deleted while it was embedded"
    else:
        row.state, row.error, row.slices = ENDS[embedding.state], embedding.error, embedding.slices
        moment = embedding.touched_at
        verdict = session.get_one(SeriesRow, row.series_uid).verdict or {}
        row.slices_set_aside = Counter(each["reason"] for each in verdict.get("set_aside", []))
    row.seconds = round(max(0.0, (moment - (row.started_at or moment)).total_seconds()), 3)
    return True
