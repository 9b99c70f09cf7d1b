"""SQL: which series a search may answer with."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import ColumnElement, Select, and_, case, select

from service.storage.database import Database
from service.storage.tables import EmbeddingRow, PatientRow, SeriesRow, SeriesTagRow

Scope = Literal["none", "series", "study", "patient"]


@dataclass(frozen=True)
class Wanted:
    """What a series must be. A field without values asks for nothing; of several values one must fit."""

    series_uid: Sequence[str] = ()
    study_uid: Sequence[str] = ()
    patient_id: Sequence[str] = ()
    modality: Sequence[str] = ()
    body_part: Sequence[str] = ()
    manufacturer: Sequence[str] = ()
    kernel: Sequence[str] = ()
    verdict: Sequence[str] = ()
    tags: Sequence[str] = ()  # all of them
    within: Sequence[str] = ()  # one of these tags: what the caller may see
    spacing_from_mm: float | None = None
    spacing_to_mm: float | None = None
    date_from: str | None = None  # YYYYMMDD
    date_to: str | None = None

    @property
    def anything(self) -> bool:
        return all(getattr(self, each.name) in ((), None) for each in fields(self))


@dataclass(frozen=True)
class Narrowed:
    """The series that may answer: only some, or all but some."""

    only: frozenset[str] | None = None  # None: every one
    without: frozenset[str] = frozenset()
    rows: int | None = None  # that `only` has; None where nobody counted

    def permits(self, series_uid: str) -> bool:
        return series_uid not in self.without and (self.only is None or series_uid in self.only)


class Selection:
    """Filters are answered by the catalog, at the moment they are asked: a tag counts at once.

    What comes out are series UIDs; the index carries no date, name or tag.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def narrowed(self, encoder_id: str, wanted: Wanted, exclude: Scope, of: Sequence[str]) -> Narrowed:
        """Series with a bag of this encoder that are as wanted, without those that share `exclude` with series `of`."""
        with self._database.read() as session:
            without = frozenset(session.scalars(_related(exclude, of))) if exclude != "none" and of else frozenset()
            if wanted.anything:
                return Narrowed(None, without)
            fits = case((and_(*_conditions(wanted)), True), else_=False)
            query = select(EmbeddingRow.series_uid, EmbeddingRow.indexed_rows, fits).join(
                SeriesRow, SeriesRow.series_uid == EmbeddingRow.series_uid
            )
            query = query.join(PatientRow, PatientRow.patient_key == SeriesRow.patient_key)
            mine = EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.content.is_not(None)
            every = [(uid, rows or 0, bool(fit)) for uid, rows, fit in session.execute(query.where(*mine))]
        only = {uid: rows for uid, rows, fit in every if fit and uid not in without}
        if 2 * len(only) > len(every) and not wanted.within:  # the shorter list is the quicker one
            return Narrowed(None, frozenset(uid for uid, _, _ in every if uid not in only) | without, None)
        return Narrowed(frozenset(only), frozenset(), sum(only.values()))

    def series(self, encoder_id: str, wanted: Wanted) -> list[str]:
        """The series with a bag of this encoder that are as wanted, in the order of their UIDs."""
        query = select(EmbeddingRow.series_uid).join(SeriesRow, SeriesRow.series_uid == EmbeddingRow.series_uid)
        query = query.join(PatientRow, PatientRow.patient_key == SeriesRow.patient_key)
        mine = EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.content.is_not(None)
        with self._database.read() as session:
            found = session.scalars(query.where(*mine, *_conditions(wanted)).order_by(EmbeddingRow.series_uid))
            return list(found)


def tagged_with(tags: Sequence[str]) -> Select[str]:
    """The UIDs of series that have one of these tags."""
    return select(SeriesTagRow.series_uid).where(SeriesTagRow.tag.in_(tags))


def _related(scope: Scope, of: Sequence[str]) -> Any:
    column = {"series": SeriesRow.series_uid, "study": SeriesRow.study_uid, "patient": SeriesRow.patient_key}[scope]
    theirs = select(column).where(SeriesRow.series_uid.in_(of))
    return select(SeriesRow.series_uid).where(column.in_(theirs))


def _conditions(wanted: Wanted) -> list[ColumnElement[bool]]:
    columns = {
        SeriesRow.series_uid: wanted.series_uid,
        SeriesRow.study_uid: wanted.study_uid,
        PatientRow.patient_id: wanted.patient_id,
        SeriesRow.modality: [each.upper() for each in wanted.modality],
        SeriesRow.body_part: [each.upper() for each in wanted.body_part],
        SeriesRow.manufacturer: wanted.manufacturer,
        SeriesRow.kernel: wanted.kernel,
        SeriesRow.verdict["status"].as_string(): wanted.verdict,
    }
    found = [column.in_(values) for column, values in columns.items() if values]
    for tag in wanted.tags:
        tagged = select(SeriesTagRow.series_uid).where(SeriesTagRow.tag == tag)
        found.append(SeriesRow.series_uid.in_(tagged))
    if wanted.within:
        found.append(SeriesRow.series_uid.in_(tagged_with(wanted.within)))
    spacing = SeriesRow.geometry["slice_spacing_mm"].as_float()
    if wanted.spacing_from_mm is not None:
        found.append(spacing >= wanted.spacing_from_mm)
    if wanted.spacing_to_mm is not None:
        found.append(spacing <= wanted.spacing_to_mm)
    if wanted.date_from is not None:
        found.append(SeriesRow.study_date >= wanted.date_from)
    if wanted.date_to is not None:
        found.append(and_(SeriesRow.study_date != "", SeriesRow.study_date <= wanted.date_to))
    return found
