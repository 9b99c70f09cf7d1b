"""SQL: studies and what the headers of their series say, as a query asks for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any

from sqlalchemy import ColumnElement, Select, func, or_, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.storage.database import Database
from service.storage.tables import PatientRow, SeriesRow

STUDIES_AT_ONCE = 100
NAME_GROUPS = "Alphabetic", "Ideographic", "Phonetic"  # of a person's name (PS3.18 F.2.2)


@dataclass(frozen=True)
class FoundSeries:
    series_uid: str
    study_uid: str
    patient_id: str
    received: int  # instances in the archive
    header: dict[str, Any]  # SeriesRow.header


@dataclass(frozen=True)
class Wanted:
    """Which series to look at. Text is matched in any case, by LIKE where it holds a wildcard; a query may then be
    stricter than this."""

    study_uids: Sequence[str] = ()
    series_uids: Sequence[str] = ()
    study_date: tuple[str, str] | None = None  # YYYYMMDD, both inclusive
    like: dict[str, str] = field(
        default_factory=dict
    )  # keyword of LIKEABLE or PatientName -> pattern, backslash escapes


LIKEABLE: dict[str, InstrumentedAttribute[str]] = {
    "PatientID": PatientRow.patient_id,
    "AccessionNumber": SeriesRow.accession_number,
    "Modality": SeriesRow.modality,
    "ModalitiesInStudy": SeriesRow.modality,  # of another series of the study perhaps: see _conditions()
    "BodyPartExamined": SeriesRow.body_part,
}


class Studies:
    """Reads what the catalog knows of studies. Each search is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def search(self, wanted: Wanted) -> Iterator[list[FoundSeries]]:
        """Studies that have a series of these, each with all its series; the latest first."""
        query = (
            select(SeriesRow.study_uid)
            .join(SeriesRow.patient)
            .where(*_conditions(wanted))
            .group_by(SeriesRow.study_uid)
            .order_by(func.max(SeriesRow.study_date).desc(), SeriesRow.study_uid)
        )
        with self._database.read() as session:
            for page in _pages(session, query):
                yield from _whole(session, page)

    def series_uids(self, study_uid: str) -> list[str]:
        with self._database.read() as session:
            query = select(SeriesRow.series_uid).where(SeriesRow.study_uid == study_uid)
            return list(session.scalars(query.order_by(SeriesRow.series_uid)))


def _pages(session: Session, query: Select[str]) -> Iterator[list[str]]:
    for start in count(0, STUDIES_AT_ONCE):
        page = list(session.scalars(query.limit(STUDIES_AT_ONCE).offset(start)))
        if page:
            yield page
        if len(page) < STUDIES_AT_ONCE:
            return


def _whole(session: Session, study_uids: list[str]) -> Iterator[list[FoundSeries]]:
    """All series of the studies, in the studies' order."""
    query = (
        select(SeriesRow.series_uid, SeriesRow.study_uid, PatientRow.patient_id, SeriesRow.received, SeriesRow.header)
        .join(SeriesRow.patient)
        .where(SeriesRow.study_uid.in_(study_uids))
        .order_by(SeriesRow.study_uid, SeriesRow.series_uid)
    )
    every = [FoundSeries(*row) for row in session.execute(query)]
    studies = {study_uid: list(group) for study_uid, group in groupby(every, key=lambda each: each.study_uid)}
    return iter([studies[study_uid] for study_uid in study_uids if study_uid in studies])


def _conditions(wanted: Wanted) -> Iterator[ColumnElement[bool]]:
    if wanted.study_uids:
        yield SeriesRow.study_uid.in_(wanted.study_uids)
    if wanted.series_uids:
        yield SeriesRow.series_uid.in_(wanted.series_uids)
    if wanted.study_date:
        yield SeriesRow.study_date.between(*wanted.study_date)
    for keyword, pattern in wanted.like.items():
        if keyword == "PatientName":
            groups = [SeriesRow.header[("00100010", "Value", 0, group)].as_string() for group in NAME_GROUPS]
            yield or_(*(each.ilike(pattern, escape="\\") for each in groups))
        elif keyword == "ModalitiesInStudy":
            having = select(SeriesRow.study_uid).where(_like(SeriesRow.modality, pattern))
            yield SeriesRow.study_uid.in_(having)
        else:
            yield _like(LIKEABLE[keyword], pattern)


def _like(column: InstrumentedAttribute[str], pattern: str) -> ColumnElement[bool]:
    """Equality where that will do, for an index serves it."""
    if any(each in pattern for each in "%_\\"):
        return column.ilike(pattern, escape="\\")
    return column == pattern
