"""SQL: cohorts, by what the catalog knows of their series: the series, and their committed embeddings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Select, func, or_, select

from service.storage.database import Database
from service.storage.keys import EmbeddingKey
from service.storage.selection import tagged_with
from service.storage.tables import EmbeddingRow, PatientRow, SeriesRow, SeriesTagRow

PAGE = 500  # series of one query
COUNTED = 10_000  # of a query for nothing but their sizes
MODEL = "00081090"  # ManufacturerModelName, as SeriesRow.header names it
DESCRIPTIONS = ("0008103E", "00081030", MODEL, "00181030")  # of series and study, and ProtocolName


@dataclass(frozen=True)
class CohortFilter:
    """Every condition that is set must hold."""

    patient_id: tuple[str, ...] = ()
    study_uid: tuple[str, ...] = ()
    series_uid: tuple[str, ...] = ()
    date_from: str | None = None  # YYYYMMDD, of the study
    date_to: str | None = None  # YYYYMMDD, that day included
    modality: str | None = None
    body_part: str | None = None
    manufacturer: str | None = None
    kernel: str | None = None
    verdict: str | None = None
    within: tuple[str, ...] = ()  # one of these tags: what the caller may see


@dataclass(frozen=True)
class Member:
    """A series of a cohort and the bag of it that counts."""

    key: EmbeddingKey
    content: str
    slices: int
    study_uid: str
    patient_key: str
    patient_id: str
    body_part: str
    manufacturer: str
    model: str
    kernel: str


class Cohorts:
    def __init__(self, database: Database) -> None:
        self._database = database

    def series(
        self,
        chosen: CohortFilter,
        *,
        words: Sequence[str] = (),
        tags: Sequence[str] = (),
        state: str | None = None,
        after: str | None = None,
        limit: int,
    ) -> list[SeriesRow]:
        """Series, embedded or not, in the order of their UIDs, those behind `after`.

        Every word is in some text that is known of it, every tag is one of its own, and `state` is that of the
        embedding last asked for.
        """
        query = select(SeriesRow).join(SeriesRow.patient).where(*_conditions(chosen), *map(_says, words))
        for tag in tags:
            query = query.where(SeriesRow.series_uid.in_(_tagged().where(SeriesTagRow.tag == tag)))
        if state is not None:
            current = (EmbeddingRow.series_uid == SeriesRow.series_uid) & (
                EmbeddingRow.encoder_id == SeriesRow.encoder_id
            )
            query = query.join(EmbeddingRow, current).where(EmbeddingRow.state == state)
        if after is not None:
            query = query.where(SeriesRow.series_uid > after)
        with self._database.read() as session:
            return list(session.scalars(query.order_by(SeriesRow.series_uid).limit(limit)).unique())

    def size(self, chosen: CohortFilter, encoder_id: str) -> tuple[int, int]:
        """How many series, and slices of them, are embedded."""
        query = _chosen(chosen, encoder_id).with_only_columns(func.count(), func.sum(EmbeddingRow.slices))
        with self._database.read() as session:
            series, slices = session.execute(query).one()
        return series, int(slices or 0)

    def members(self, chosen: CohortFilter, encoder_id: str) -> Iterator[Member]:
        """In the order of their UIDs, some at a time: no transaction stays open while their bags are read."""
        after = ""
        while page := self._page(chosen, encoder_id, after):
            yield from page
            after = page[-1].key.series_uid

    def slices(self, chosen: CohortFilter, encoder_id: str) -> Iterator[tuple[str, int]]:
        """Series UIDs, each with how many slices it has, in the order of their UIDs."""
        query = _chosen(chosen, encoder_id).with_only_columns(SeriesRow.series_uid, EmbeddingRow.slices)
        after = ""
        while True:
            page = query.where(SeriesRow.series_uid > after).order_by(SeriesRow.series_uid).limit(COUNTED)
            with self._database.read() as session:
                found = [(series_uid, slices or 0) for series_uid, slices in session.execute(page)]
            if not found:
                return
            yield from found
            after = found[-1][0]

    def member(self, key: EmbeddingKey) -> Member | None:
        """As it is now."""
        found = self._page(CohortFilter(series_uid=(key.series_uid,)), key.encoder_id, "")
        return found[0] if found else None

    def _page(self, chosen: CohortFilter, encoder_id: str, after: str) -> list[Member]:
        query = _chosen(chosen, encoder_id).where(SeriesRow.series_uid > after)
        with self._database.read() as session:
            rows = session.execute(query.order_by(SeriesRow.series_uid).limit(PAGE)).all()
        return [
            Member(
                key=EmbeddingKey(series.series_uid, encoder_id),
                content=embedding.content or "",
                slices=embedding.slices or 0,
                study_uid=series.study_uid,
                patient_key=series.patient_key,
                patient_id=series.patient_id,
                body_part=series.body_part,
                manufacturer=series.manufacturer,
                model=model_of(series),
                kernel=series.kernel,
            )
            for series, embedding in rows
        ]


def model_of(series: SeriesRow) -> str:
    """The scanner's model, as its header says; empty where it says none."""
    values = (series.header or {}).get(MODEL, {}).get("Value") or [""]
    return str(values[0] or "")


def _chosen(chosen: CohortFilter, encoder_id: str) -> Select[SeriesRow, EmbeddingRow]:
    embedded = (EmbeddingRow.series_uid == SeriesRow.series_uid) & (EmbeddingRow.encoder_id == encoder_id)
    return (
        select(SeriesRow, EmbeddingRow)
        .join(EmbeddingRow, embedded)
        .join(PatientRow, PatientRow.patient_key == SeriesRow.patient_key)
        .where(EmbeddingRow.content.is_not(None), *_conditions(chosen))
    )


def _conditions(chosen: CohortFilter) -> list[ColumnElement[bool]]:
    found: list[ColumnElement[bool]] = []
    lists = (
        (PatientRow.patient_id, chosen.patient_id),
        (SeriesRow.study_uid, chosen.study_uid),
        (SeriesRow.series_uid, chosen.series_uid),
    )
    for column, values in lists:
        if values:
            found.append(or_(*(column.in_(values[k : k + PAGE]) for k in range(0, len(values), PAGE))))
    texts = (
        (SeriesRow.modality, chosen.modality),
        (SeriesRow.body_part, chosen.body_part),
        (SeriesRow.manufacturer, chosen.manufacturer),
        (SeriesRow.kernel, chosen.kernel),
    )
    for text_column, text in texts:
        if text is not None:
            found.append(func.upper(text_column) == text.upper())
    if chosen.date_from is not None:
        found.append(SeriesRow.study_date >= chosen.date_from)
    if chosen.date_to is not None:
        found += [SeriesRow.study_date <= chosen.date_to, SeriesRow.study_date != ""]
    if chosen.within:
        found.append(SeriesRow.series_uid.in_(tagged_with(chosen.within)))
    if chosen.verdict is not None:
        found.append(SeriesRow.verdict["status"].as_string() == chosen.verdict)
    return found


def _says(word: str) -> ColumnElement[bool]:
    """Somewhere in what is known of a series, whatever its case (SQLite: that of ASCII)."""
    columns = (
        PatientRow.patient_id,
        SeriesRow.series_uid,
        SeriesRow.study_uid,
        SeriesRow.accession_number,
        SeriesRow.study_date,
        SeriesRow.modality,
        SeriesRow.body_part,
        SeriesRow.manufacturer,
        SeriesRow.kernel,
        *(SeriesRow.header[(tag, "Value", 0)].as_string() for tag in DESCRIPTIONS),
    )
    tagged = _tagged().where(SeriesTagRow.tag.icontains(word, autoescape=True))
    return or_(*(column.icontains(word, autoescape=True) for column in columns), SeriesRow.series_uid.in_(tagged))


def _tagged() -> Select[str]:
    return select(SeriesTagRow.series_uid)
