"""SQL: which series there are, what is known of them, and how far their embeddings are."""

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import Select, and_, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from service.errors import (
    BeingErased,
    JobNotFound,
    NotEmbeddedYet,
    NotFailed,
    OtherEncoder,
    PatientNotFound,
    SeriesNotFound,
    StudyNotFound,
)
from service.storage.archive import Archive, content_of
from service.storage.checksums import note as note_sums
from service.storage.database import Database, alone
from service.storage.exports import cancel
from service.storage.keys import EmbeddingKey
from service.storage.tables import (
    EmbeddingRow,
    ErasingSeriesRow,
    ExportRow,
    HeadRow,
    JobRow,
    JobSeriesRow,
    PatientRow,
    SeriesRow,
    now,
)

WAITING = ("received", "queued")
LOST_AT_ONCE = 1000  # of embeddings; the next look finds the next
OPEN = (*WAITING, "embedding")
CANCELLED = "cancelled on request"


@dataclass(frozen=True)
class Arrival:
    """What an upload, or a sender on the network, brought of one series."""

    series_uid: str
    study_uid: str
    patient_id: str
    about: Mapping[str, Any] = field(default_factory=dict)  # columns of SeriesRow: service/about.py
    sop_uids: Sequence[str] = ()  # what it brought, new or not: all of it must still be in the archive
    sums: Mapping[str, bytes] = field(default_factory=dict)  # SHA-256 of what the catalog has none of, or another
    sender: str = ""  # as the audit names them


@dataclass(frozen=True)
class Quiet:
    """When a series that comes slice by slice counts as whole."""

    seconds: float  # without another slice of it
    limit_seconds: float  # after its first slice, however many still come


class Catalog:
    """The truth about state. Each method is one transaction."""

    def __init__(self, database: Database, archive: Archive) -> None:
        self._database = database
        self._archive = archive

    def receive(self, arrivals: Sequence[Arrival], encoder_id: str) -> str:
        """Note the series of one upload, ask for their embeddings, and open a job that watches them."""
        try:
            return self._receive(arrivals, encoder_id)
        except IntegrityError:  # another upload of a new series was first: its row is there now
            return self._receive(arrivals, encoder_id)

    def _receive(self, arrivals: Sequence[Arrival], encoder_id: str) -> str:
        job_id = uuid.uuid4().hex
        with self._database.write() as session:
            session.add(JobRow(job_id=job_id))
            for arrival in sorted(arrivals, key=lambda each: each.series_uid):
                _note(session, arrival, encoder_id, self._archive, None)
                session.add(JobSeriesRow(job_id=job_id, series_uid=arrival.series_uid, encoder_id=encoder_id))
        return job_id

    def collect(self, arrivals: Sequence[Arrival], encoder_id: str, quiet: Quiet | None) -> None:
        """Note slices of series of which more may come; the sweep asks for their embeddings when they are whole.

        Without a quiet time they are whole now.
        """
        try:
            self._collect(arrivals, encoder_id, quiet)
        except IntegrityError:  # as in receive()
            self._collect(arrivals, encoder_id, quiet)

    def _collect(self, arrivals: Sequence[Arrival], encoder_id: str, quiet: Quiet | None) -> None:
        with self._database.write() as session:
            for arrival in sorted(arrivals, key=lambda each: each.series_uid):
                _note(session, arrival, encoder_id, self._archive, quiet)

    def complete(self, series_uid: str) -> list[EmbeddingKey]:
        """The series is whole, whatever its quiet time says; answers the embeddings that wait for a message."""
        with self._database.write() as session:
            series = session.get(SeriesRow, series_uid, with_for_update={"of": SeriesRow})
            if series is None:
                raise SeriesNotFound(f"no series {series_uid}")
            series.whole_at = min(series.whole_at, now())
            return [EmbeddingKey(series_uid, row.encoder_id) for row in series.embeddings if row.state == "received"]

    def retry(self, series_uid: str) -> EmbeddingKey:
        """The embedding last asked for failed, and waits for a message again. Raises SeriesNotFound or NotFailed."""
        with self._database.write() as session:
            series = session.get(SeriesRow, series_uid, with_for_update={"of": SeriesRow})
            if series is None:
                raise SeriesNotFound(f"no series {series_uid}")
            row = series.current
            if row.state != "failed":
                raise NotFailed(f"series {series_uid} is {row.state}, expected failed", state=row.state)
            row.state, row.attempts, row.error, row.touched_at = "received", 0, None, now()
            return EmbeddingKey(series_uid, row.encoder_id)

    def abandon(self, series_uid: str) -> None:
        """Remove what an upload archived and could not note, where there is no such series."""
        with self._database.write() as session:
            alone(session, series_uid)  # whoever notes the series meanwhile finds its files gone, and says so
            if session.get(SeriesRow, series_uid) is None:
                self._archive.remove(series_uid)

    def owner(self, series_uid: str) -> tuple[str, str] | None:
        """(patient id, study UID) of a series that is here already."""
        with self._database.read() as session:
            row = session.get(SeriesRow, series_uid)
            return (row.patient_id, row.study_uid) if row else None

    def waiting(self, job_id: str) -> list[EmbeddingKey]:
        """The job's embeddings that no message has been sent for."""
        query = _of_job(job_id).where(EmbeddingRow.state == "received")
        with self._database.read() as session:
            return sorted(EmbeddingKey(row.series_uid, row.encoder_id) for row in session.scalars(query))

    def backlog(self, sender: str, most: int) -> int:
        """How many series of a sender wait for a worker; counted up to `most`."""
        with self._database.read() as session:
            return _backlog(session, sender, most)

    def behind(self, keys: Sequence[EmbeddingKey], share: int) -> set[EmbeddingKey]:
        """Those of the embeddings before which `share` others of the same sender are queued already."""
        behind: set[EmbeddingKey] = set()
        with self._database.read() as session:
            for sender, asked in _by_sender(session, keys).items():
                again = sum(row.state == "queued" for row in asked)  # the sweep has said so before it sends
                others = _backlog(session, sender, share + again, ("queued",)) - again
                behind.update(EmbeddingKey(row.series_uid, row.encoder_id) for row in asked[max(0, share - others) :])
        return behind

    def sent(self, keys: Sequence[EmbeddingKey]) -> None:
        """Messages for these embeddings are with the broker."""
        with self._database.write() as session:
            for key in keys:
                rows = update(EmbeddingRow).where(_is(key), EmbeddingRow.state.in_(WAITING))
                session.execute(rows.values(state="queued", touched_at=now()))

    def lost(self, stale_seconds: float, queue_is_empty: bool) -> list[EmbeddingKey]:
        """Embeddings that nobody else sends a message for: their worker fell silent, their message is gone, or their
        series came slice by slice and is whole now. They are waiting again: so many, and some of every sender."""
        stale = EmbeddingRow.touched_at < now() - timedelta(seconds=stale_seconds)
        silent = and_(EmbeddingRow.state == "embedding", stale)
        gone = EmbeddingRow.state.in_(WAITING) if queue_is_empty else EmbeddingRow.state == "received"
        collected = and_(EmbeddingRow.state == "received", SeriesRow.collecting_since.is_not(None))
        whole = SeriesRow.whole_at <= now()
        due = or_(silent, and_(gone, stale, whole), and_(collected, whole))
        turn = func.row_number().over(partition_by=EmbeddingRow.sender, order_by=EmbeddingRow.touched_at)
        query = select(EmbeddingRow).join(SeriesRow, SeriesRow.series_uid == EmbeddingRow.series_uid).where(due)
        with self._database.write() as session:
            rows = session.scalars(query.order_by(turn).limit(LOST_AT_ONCE)).all()
            for row in rows:
                row.state, row.holder, row.touched_at = "queued", None, now()
            return [EmbeddingKey(row.series_uid, row.encoder_id) for row in rows]

    def claim(self, key: EmbeddingKey, holder: str, stale_seconds: float, max_attempts: int) -> bool:
        """Take an embedding on; False where it is done, given up, or in a living worker's hands."""
        with self._database.write() as session:
            row = session.get(EmbeddingRow, (key.series_uid, key.encoder_id), with_for_update=True)
            if row is None or row.state not in OPEN:
                return False
            if row.state == "embedding" and row.touched_at > now() - timedelta(seconds=stale_seconds):
                return False
            if session.get_one(SeriesRow, key.series_uid).whole_at > now():  # more slices came since it was sent for
                row.state, row.holder = "received", None
                return False
            if row.attempts >= max_attempts:
                row.state, row.error = (
                    "failed",
                    f"given up after {row.attempts} attempts: {row.error or 'the worker died'}",
                )
                return False
            row.state, row.holder, row.touched_at, row.attempts = "embedding", holder, now(), row.attempts + 1
            row.done = 0
            return True

    def progress(self, key: EmbeddingKey, done: int, known: int) -> bool:
        """Slices done of slices known; also the sign that the worker lives. False where the series was erased."""
        with self._database.note() as session:
            rows = update(EmbeddingRow).where(_is(key)).values(done=done, known=known, touched_at=now())
            return bool(session.execute(rows).rowcount)  # type: ignore[attr-defined]

    def commit(
        self,
        key: EmbeddingKey,
        content: str,
        slices: int,
        verdict: dict[str, Any],
        geometry: dict[str, Any],
        series_key: str | None = None,
    ) -> bool:
        """The bag is on disk: this is the write that makes it count.

        False where the series was erased: there is none, or another one than `series_key` says.
        """
        with self._database.write() as session:
            series = session.get(SeriesRow, key.series_uid, with_for_update={"of": SeriesRow})
            if series is None or series_key not in (None, series.series_key):
                return False
            row = session.get_one(EmbeddingRow, (key.series_uid, key.encoder_id))
            series.verdict, series.geometry = verdict, geometry
            row.content, row.slices, row.embedded_at, row.touched_at = content, slices, now(), now()
            row.done = row.known = slices
            row.holder, row.error, row.attempts = None, None, 0
            # Slices that came while this ran make another embedding of the whole series.
            row.state = "embedded" if series.content == content else "received"
            return True

    def release(self, key: EmbeddingKey, error: str, *, counted: bool = True) -> None:
        """Hand an embedding back, to be tried again; where the attempt does not count, without end."""
        attempts = EmbeddingRow.attempts - (0 if counted else 1)
        with self._database.write() as session:
            rows = update(EmbeddingRow).where(_is(key), EmbeddingRow.state == "embedding")
            session.execute(rows.values(state="queued", holder=None, error=error, touched_at=now(), attempts=attempts))

    def fail(self, key: EmbeddingKey, state: str, error: str, verdict: dict[str, Any] | None = None) -> None:
        """Give up on an embedding: `failed`, or `rejected` with its verdict."""
        with self._database.write() as session:
            row = session.get(EmbeddingRow, (key.series_uid, key.encoder_id))
            if row is None:  # erased meanwhile
                return
            row.state, row.error, row.holder, row.touched_at = state, error, None, now()
            if verdict:
                session.get_one(SeriesRow, key.series_uid).verdict = verdict

    def series(self, series_uid: str) -> SeriesRow:
        with self._database.read() as session:
            row = session.get(SeriesRow, series_uid)
        if row is None:
            raise SeriesNotFound(f"no series {series_uid}")
        return row

    def embedding(self, series_uid: str, encoder_id: str) -> EmbeddingRow:
        """The committed embedding. Raises SeriesNotFound, NotEmbeddedYet or OtherEncoder."""
        with self._database.read() as session:
            found = session.get(EmbeddingRow, (series_uid, encoder_id))
        if found and found.content is not None:
            return found
        series = self.series(series_uid)
        for row in series.embeddings:
            if row.encoder_id == encoder_id:
                if row.content is None:
                    raise NotEmbeddedYet(f"series {series_uid} is {row.state}, expected embedded", state=row.state)
                return row
        present = ", ".join(row.encoder_id for row in series.embeddings)
        raise OtherEncoder(f"series {series_uid} has embeddings of {present}, expected {encoder_id}")

    def patient_embeddings(
        self, patient_id: str, encoder_id: str, *, series_uid: str | None = None, study_uid: str | None = None
    ) -> list[EmbeddingRow]:
        """The committed embeddings of a patient's accepted series, in the order of their UIDs."""
        query = select(SeriesRow).join(SeriesRow.patient).where(PatientRow.patient_id == patient_id)
        with self._database.read() as session:
            every = list(session.scalars(query.order_by(SeriesRow.series_uid)).unique())
        if not every:
            raise PatientNotFound("no patient of this id")
        chosen = [
            row
            for row in every
            if (study_uid is None or row.study_uid == study_uid)
            and (series_uid is None or row.series_uid == series_uid)
        ]
        if not chosen:
            missing = SeriesNotFound if series_uid else StudyNotFound
            raise missing("the patient has no such series or study")
        rows = [row for series in chosen for row in series.embeddings]
        ready = [row for row in rows if row.encoder_id == encoder_id and row.content is not None]
        if not ready:
            present = sorted({row.encoder_id for row in rows if row.content is not None})
            if present:
                raise OtherEncoder(
                    f"the patient's series have embeddings of {', '.join(present)}, expected {encoder_id}"
                )
            raise NotEmbeddedYet("none of the patient's series is embedded yet", states=sorted({r.state for r in rows}))
        return ready

    def labelled_embeddings(self, by: str, names: Sequence[str], encoder_id: str) -> dict[str, list[tuple[str, str]]]:
        """For each known patient id, study or series UID: (patient key, series UID) of its committed embeddings."""
        columns = {"patient": PatientRow.patient_id, "study": SeriesRow.study_uid, "series": SeriesRow.series_uid}
        column = columns[by]
        here = and_(
            EmbeddingRow.series_uid == SeriesRow.series_uid,
            EmbeddingRow.encoder_id == encoder_id,
            EmbeddingRow.content.is_not(None),
        )
        answer: dict[str, list[tuple[str, str]]] = {}
        with self._database.read() as session:
            for start in range(0, len(names), 500):  # SQLite takes a limited number of parameters
                part = (
                    select(column, SeriesRow.series_uid, EmbeddingRow.series_uid, SeriesRow.patient_key)
                    .select_from(SeriesRow)
                    .join(SeriesRow.patient)
                    .outerjoin(EmbeddingRow, here)
                    .where(column.in_(names[start : start + 500]))
                    .order_by(SeriesRow.series_uid)
                )
                for name, series_uid, embedded, patient_key in session.execute(part):
                    found = answer.setdefault(name, [])
                    if embedded:
                        found.append((patient_key, series_uid))
        return answer

    def cancel(self, job_id: str) -> None:
        """Give up what of a job no worker has begun, a head in training, an export. What has ended stays as it is."""
        with self._database.write() as session:
            job = session.get(JobRow, job_id)
            if job is None:
                raise JobNotFound(f"no job {job_id}")
            if job.export is not None:
                if cancel(session, session.get_one(ExportRow, job.export.export_id, with_for_update=True)):
                    job.cancelled_at = now()
                return
            if job.head_id is not None:
                head = session.get_one(HeadRow, job.head_id, with_for_update=True)
                stopped = [head] if head.state in ("received", "queued", "training") else []
            else:
                waiting = _of_job(job_id).where(EmbeddingRow.state.in_(WAITING))
                stopped = [*session.scalars(waiting.with_for_update(of=EmbeddingRow))]
            for row in stopped:
                row.state = "cancelled" if isinstance(row, HeadRow) else "failed"
                row.error, row.holder, row.touched_at = CANCELLED, None, now()
            if stopped:
                job.cancelled_at = now()

    def last_embedded_at(self) -> Any:
        with self._database.read() as session:
            return session.scalar(select(func.max(EmbeddingRow.embedded_at)))

    def patient_key(self, patient_id: str) -> str | None:
        with self._database.read() as session:
            return session.scalar(select(PatientRow.patient_key).where(PatientRow.patient_id == patient_id))

    def patient_ids(self, series_uids: Collection[str]) -> dict[str, str]:
        """Whose the series are; of one that was erased nothing."""
        query = select(SeriesRow.series_uid, PatientRow.patient_id).join(SeriesRow.patient)
        wanted = sorted(set(series_uids))
        found: dict[str, str] = {}
        with self._database.read() as session:
            for start in range(0, len(wanted), 500):  # SQLite takes a limited number of parameters
                part = query.where(SeriesRow.series_uid.in_(wanted[start : start + 500]))
                found.update(session.execute(part).tuples().all())
        return found

    def has(self, series_uid: str) -> bool:
        with self._database.read() as session:
            return session.get(SeriesRow, series_uid) is not None


def _note(session: Session, arrival: Arrival, encoder_id: str, archive: Archive, quiet: Quiet | None) -> None:
    alone(session, arrival.series_uid)
    series = session.get(SeriesRow, arrival.series_uid, with_for_update={"of": SeriesRow})
    # Listed inside the transaction: of two uploads of one series at once, the later sees both's files.
    sop_uids = archive.sop_uids(arrival.series_uid)
    content, received = content_of(sop_uids), len(sop_uids)
    _refuse_erased(session, arrival, sop_uids)
    changed = series is None or series.content != content
    if series is None:
        patient_key = _patient_key(session, arrival.patient_id)
        series = SeriesRow(series_uid=arrival.series_uid, study_uid=arrival.study_uid, patient_key=patient_key)
        session.add(series)
    if not series.header:
        for column, value in arrival.about.items():
            setattr(series, column, value)
    series.received, series.content, series.encoder_id = received, content, encoder_id
    if changed:
        _wait_for_more(series, quiet)
    elif quiet is None:
        series.whole_at = min(series.whole_at, now())
    session.flush()
    note_sums(session, arrival.series_uid, arrival.sums)
    embedding = session.get(EmbeddingRow, (arrival.series_uid, encoder_id))
    if embedding is None:
        embedding = EmbeddingRow(series_uid=arrival.series_uid, encoder_id=encoder_id, state="received")
        embedding.sender = arrival.sender
        session.add(embedding)
    elif embedding.state == "failed" or (changed and embedding.state not in OPEN):
        embedding.state, embedding.attempts, embedding.error = "received", 0, None
        embedding.sender = arrival.sender
    session.flush()


def _refuse_erased(session: Session, arrival: Arrival, sop_uids: Sequence[str]) -> None:
    """Raises BeingErased where an erasure is at work on the series, or took files of this arrival with it."""
    taken = not set(arrival.sop_uids) <= set(sop_uids)
    if taken or session.get(ErasingSeriesRow, arrival.series_uid) is not None:
        raise BeingErased(f"series {arrival.series_uid} is being erased; send it again later")


def _wait_for_more(series: SeriesRow, quiet: Quiet | None) -> None:
    """Set when the series counts as whole: now, or after its quiet time, its limit, or its last expected slice."""
    moment = now()
    if quiet is None or (series.expected and series.received >= series.expected):
        series.collecting_since = moment if quiet else None
        series.whole_at = moment
        return
    if series.collecting_since is None or series.whole_at <= moment:
        series.collecting_since = moment
    limit = series.collecting_since + timedelta(seconds=quiet.limit_seconds)
    series.whole_at = min(moment + timedelta(seconds=quiet.seconds), limit)


def _backlog(session: Session, sender: str, most: int, states: Sequence[str] = WAITING) -> int:
    waiting = select(EmbeddingRow.series_uid).where(EmbeddingRow.state.in_(states), EmbeddingRow.sender == sender)
    return session.scalar(select(func.count()).select_from(waiting.limit(most).subquery())) or 0


def _by_sender(session: Session, keys: Sequence[EmbeddingKey]) -> dict[str, list[EmbeddingRow]]:
    """Their rows, in the order of the keys."""
    rows: dict[tuple[str, str], EmbeddingRow] = {}
    for start in range(0, len(keys), 500):  # SQLite takes a limited number of parameters
        uids = {key.series_uid for key in keys[start : start + 500]}
        found = session.scalars(select(EmbeddingRow).where(EmbeddingRow.series_uid.in_(uids)))
        rows.update({(row.series_uid, row.encoder_id): row for row in found})
    groups: dict[str, list[EmbeddingRow]] = defaultdict(list)
    for key in keys:
        if row := rows.get((key.series_uid, key.encoder_id)):
            groups[row.sender].append(row)
    return groups


def _of_job(job_id: str) -> Select[Any]:
    mine = and_(JobSeriesRow.series_uid == EmbeddingRow.series_uid, JobSeriesRow.encoder_id == EmbeddingRow.encoder_id)
    return select(EmbeddingRow).join(JobSeriesRow, mine).where(JobSeriesRow.job_id == job_id)


def _is(key: EmbeddingKey) -> Any:
    return and_(EmbeddingRow.series_uid == key.series_uid, EmbeddingRow.encoder_id == key.encoder_id)


def _patient_key(session: Session, patient_id: str) -> str:
    query = select(PatientRow.patient_key).where(PatientRow.patient_id == patient_id)
    if found := session.scalar(query):
        return found
    row = PatientRow(patient_key=uuid.uuid4().hex, patient_id=patient_id)
    session.add(row)
    session.flush()
    return row.patient_key
