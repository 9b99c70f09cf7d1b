"""SQL: what is being erased, and everything of it that is in the catalog itself."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import String, Table, cast, delete, or_, select
from sqlalchemy.orm import Session

from service.errors import ErasureNotFound, PatientNotFound, SeriesNotFound
from service.storage.chain import SERVICE, Chain, Event
from service.storage.database import Database
from service.storage.exports import forget, forget_queries
from service.storage.tables import (
    ErasingSeriesRow,
    ErasureRow,
    HeadNetworkRow,
    HeadRow,
    PatientRow,
    PredictionBagRow,
    PredictionRow,
    Row,
    SeriesRow,
    now,
)

AT_ONCE = 200  # SQLite takes a limited number of parameters
ASKED, ERASED_ALL = "erase", "erase.receipt"  # kinds of the audit
ERASED = "a series of its labels table was erased; train it again"


@dataclass(frozen=True)
class Doomed:
    """What an erasure still has to remove."""

    series_uids: list[str]
    encoder_ids: list[str]
    marks: list[str]  # texts that no file of the catalog may hold afterwards


class Erasures:
    """An erasure is a row from the moment it is asked for; each method is one transaction."""

    def __init__(self, database: Database, chain: Chain) -> None:
        self._database = database
        self._chain = chain

    def begin(self, *, series_uid: str | None = None, patient_id: str | None = None, who: str = SERVICE) -> str:
        """Take a series, or a patient with every series, out of the catalog; answers the erasure's id.

        From here on nobody finds any of it. Asked again before the end, it is the same erasure.
        Raises SeriesNotFound or PatientNotFound.
        """
        with self._database.write() as session:
            series = _series(session, series_uid, patient_id)
            if not series:
                begun = _begun(session, series_uid, patient_id)
                self._chain.append(session, [Event(who, ASKED, about=(("erasure", begun),))])
                return begun
            gone = {row.patient_key for row in series} - _with_other_series(session, series)
            patients = list(session.scalars(select(PatientRow).where(PatientRow.patient_key.in_(gone))))
            uids = [row.series_uid for row in series]
            embeddings = [row for each in series for row in each.embeddings]
            erasure = ErasureRow(
                erasure_id=uuid.uuid4().hex,
                patient_id=patients[0].patient_id if patients else None,
                series=len(series),
                encoder_ids=sorted({row.encoder_id for row in embeddings}),
                heads=_leave_heads(session, series, gone if patient_id is not None else set()),
                removed={},
            )
            session.add(erasure)
            session.flush()
            asked = _asked(who, erasure, series)
            for uid in uids:
                holders = [row.holder for row in embeddings if row.series_uid == uid and row.state == "embedding"]
                session.add(ErasingSeriesRow(series_uid=uid, erasure_id=erasure.erasure_id, holders=holders))
            for some in _parts(uids):
                forget(session, some, [patient.patient_id for patient in patients])
            forget_queries(session, _asked_for(session, series, patients))
            erasure.removed = _leave_tables(session, uids)
            session.execute(delete(PatientRow).where(PatientRow.patient_key.in_(gone)))
            self._chain.append(session, [asked])
            return erasure.erasure_id

    def get(self, erasure_id: str) -> ErasureRow:
        with self._database.read() as session:
            row = session.get(ErasureRow, erasure_id)
        if row is None:
            raise ErasureNotFound(f"no erasure {erasure_id}")
        return row

    def unfinished(self) -> list[str]:
        with self._database.read() as session:
            query = select(ErasureRow.erasure_id).where(ErasureRow.erased_at.is_(None)).order_by(ErasureRow.asked_at)
            return list(session.scalars(query))

    def doomed(self, erasure_id: str) -> Doomed:
        with self._database.read() as session:
            row = session.get_one(ErasureRow, erasure_id)
            mine = select(ErasingSeriesRow.series_uid).where(ErasingSeriesRow.erasure_id == erasure_id)
            uids = sorted(session.scalars(mine))
        return Doomed(uids, row.encoder_ids, [*uids, *([row.patient_id] if row.patient_id else [])])

    def being_erased(self, series_uid: str) -> bool:
        with self._database.read() as session:
            return session.get(ErasingSeriesRow, series_uid) is not None

    def let_go(self, series_uid: str, holder: str) -> None:
        """A worker has stopped embedding the series, and left nothing behind."""
        with self._database.write() as session:
            row = session.get(ErasingSeriesRow, series_uid, with_for_update=True)
            if row:
                row.holders = [each for each in row.holders if each != holder]

    def held(self, erasure_id: str, stale_seconds: float) -> bool:
        """Whether a worker that may still live has some of it in hand."""
        mine = select(ErasingSeriesRow).where(ErasingSeriesRow.erasure_id == erasure_id)
        with self._database.read() as session:
            asked_at = session.get_one(ErasureRow, erasure_id).asked_at
            held = any(row.holders for row in session.scalars(mine))
        return held and asked_at > now() - timedelta(seconds=stale_seconds)

    def note(self, erasure_id: str, removed: Mapping[str, int]) -> None:
        """So much is about to be removed. Of a step that runs again, the larger number counts: it ran first."""
        with self._database.write() as session:
            row = session.get_one(ErasureRow, erasure_id, with_for_update=True)
            row.removed = row.removed | {k: max(count, row.removed.get(k, 0)) for k, count in removed.items()}

    def emptied(self, erasure_id: str) -> None:
        """Every store is empty of it: forget whom it was about."""
        with self._database.write() as session:
            row = session.get_one(ErasureRow, erasure_id, with_for_update=True)
            row.emptied, row.patient_id = True, None
            session.execute(delete(ErasingSeriesRow).where(ErasingSeriesRow.erasure_id == erasure_id))

    def finish(self, erasure_id: str) -> None:
        """Its receipt goes into the audit with it."""
        with self._database.write() as session:
            row = session.get_one(ErasureRow, erasure_id, with_for_update=True)
            if row.erased_at is None:
                row.erased_at = now()
                self._chain.append(session, [_receipt(row)])


def _asked(who: str, erasure: ErasureRow, series: Sequence[SeriesRow]) -> Event:
    """By keys that lead nowhere from now on."""
    return Event(
        who,
        ASKED,
        series_keys=tuple(row.series_key for row in series),
        patient_keys=tuple(sorted({row.patient_key for row in series})),
        about=(("erasure", erasure.erasure_id),),
    )


def _receipt(row: ErasureRow) -> Event:
    about = {"erasure": row.erasure_id, "series": row.series, "removed": row.removed, "heads": row.heads}
    return Event(SERVICE, ERASED_ALL, about=tuple(about.items()))


def _series(session: Session, series_uid: str | None, patient_id: str | None) -> list[SeriesRow]:
    query = select(SeriesRow).join(SeriesRow.patient).order_by(SeriesRow.series_uid).with_for_update(of=SeriesRow)
    mine = SeriesRow.series_uid == series_uid if series_uid is not None else PatientRow.patient_id == patient_id
    return list(session.scalars(query.where(mine)).unique())


def _begun(session: Session, series_uid: str | None, patient_id: str | None) -> str:
    """The erasure that is at work on it already."""
    if series_uid is not None:
        row = session.get(ErasingSeriesRow, series_uid)
        if row is None:
            raise SeriesNotFound(f"no series {series_uid}")
        return row.erasure_id
    found = session.scalar(select(ErasureRow.erasure_id).where(ErasureRow.patient_id == patient_id).limit(1))
    if found is None:
        raise PatientNotFound("no patient of this id")
    return found


def _with_other_series(session: Session, series: Sequence[SeriesRow]) -> set[str]:
    """Of these series' patients, the keys of those who have more."""
    keys, uids = {row.patient_key for row in series}, [row.series_uid for row in series]
    mine = select(SeriesRow.patient_key, SeriesRow.series_uid).where(SeriesRow.patient_key.in_(keys))
    return {key for key, uid in session.execute(mine) if uid not in set(uids)}


def _leave_tables(session: Session, series_uids: Sequence[str]) -> dict[str, int]:
    """Delete the rows of these series from every table that names them; predictions that one of them took part in go
    whole. Answers how many, by table."""
    removed: dict[str, int] = {}
    ids = {
        prediction_id
        for some in _parts(series_uids)
        for prediction_id in session.scalars(
            select(PredictionBagRow.prediction_id).where(PredictionBagRow.series_uid.in_(some))
        )
    }
    for kind in (PredictionBagRow, PredictionRow):
        _delete(session, kind.__table__, "prediction_id", sorted(ids), removed)  # type: ignore[arg-type]
    for table in reversed(Row.metadata.sorted_tables):  # those that refer to others first
        if "series_uid" in table.c and table.name != ErasingSeriesRow.__tablename__:
            _delete(session, table, "series_uid", series_uids, removed)
    session.expire_all()
    return removed


def _delete(session: Session, table: Table, column: str, values: Sequence[str], removed: dict[str, int]) -> None:
    for some in _parts(values):
        count = session.execute(delete(table).where(table.c[column].in_(some))).rowcount  # type: ignore[attr-defined]
        removed[table.name] = removed.get(table.name, 0) + count


def _parts(values: Sequence[str]) -> Iterator[Sequence[str]]:
    return (values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE))


def _leave_heads(session: Session, series: Sequence[SeriesRow], patient_keys: set[str]) -> list[str]:
    """Take the series out of every labels table that names them; answers the heads that were trained on one.

    A head in training ends: it would fail for want of the bag.
    """
    uids = {row.series_uid for row in series}
    names = uids | _studies_that_end(session, series)
    touched = []
    for some in _parts(sorted(names | patient_keys)):
        # A first look at the JSON as text; which of these heads do name it is then read.
        texts = [cast(HeadRow.targets, String).contains(name, autoescape=True) for name in some]
        for head in session.scalars(select(HeadRow).where(or_(*texts)).with_for_update()):
            targets = _without(head.targets, uids, names, patient_keys)
            if targets is None:
                continue
            touched.append(head.head_id)
            head.targets = targets
            if head.state in ("received", "queued", "training"):
                head.state, head.holder, head.error, head.touched_at = "cancelled", None, ERASED, now()
                session.execute(delete(HeadNetworkRow).where(HeadNetworkRow.head_id == head.head_id))
    return sorted(set(touched))


def _studies_that_end(session: Session, series: Sequence[SeriesRow]) -> set[str]:
    """The studies of which no series is left."""
    uids, studies = {row.series_uid for row in series}, {row.study_uid for row in series}
    mine = select(SeriesRow.study_uid, SeriesRow.series_uid).where(SeriesRow.study_uid.in_(studies))
    return studies - {study for study, uid in session.execute(mine) if uid not in uids}


def _asked_for(session: Session, series: Sequence[SeriesRow], patients: Sequence[PatientRow]) -> dict[str, set[str]]:
    """By what a query to a server may ask for these patients, and for the studies of which no series is left."""
    ended = _studies_that_end(session, series)
    values = {
        "patient_id": {patient.patient_id for patient in patients},
        "study_uid": ended,
        "accession_number": {row.accession_number for row in series if row.study_uid in ended},
    }
    return {field: found - {""} for field, found in values.items()}


def _without(
    targets: Mapping[str, Any], uids: set[str], names: set[str], patient_keys: set[str]
) -> dict[str, Any] | None:
    """A labels table (Matched.as_targets()) that names none of these; None where it named none.

    Its rows stay where they are, for splits and figures go by their place: a row loses its series, and a name of its
    own becomes a random one. Opaque patient keys stay.
    """
    rows, units = targets.get("rows", []), targets.get("units", [])
    if not any(patient in patient_keys or uids.intersection(own) for patient, own, _ in rows):
        return None
    return {
        **targets,
        "rows": [[patient, [uid for uid in own if uid not in uids], target] for patient, own, target in rows],
        "units": [f"erased-{uuid.uuid4().hex}" if unit in names else unit for unit in units],
    }
