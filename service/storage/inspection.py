"""SQL: what archive, bags and index are compared with, page by page, and bags that count no longer."""

from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

from sqlalchemy import func, or_, select, tuple_, update

from service.storage.catalog import OPEN
from service.storage.database import Database
from service.storage.keys import EmbeddingKey
from service.storage.tables import EmbeddingRow, SeriesRow, now

LOST_BAG = "its bag is gone or damaged; send the series again"


class Archived(NamedTuple):
    """What the archive must hold of a series: Archive.content()."""

    series_uid: str
    content: str
    received: int


class Counted(NamedTuple):
    """Which bags of an embedding count: one that is read, one whose rows are in the index."""

    content: str | None
    indexed_content: str | None
    state: str


class Inspection:
    """Each method is one transaction, and each page one."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def indexed(self, encoder_id: str, page: int) -> Iterator[dict[str, str]]:
        """By series UID, the content of the bags whose rows are in the encoder's table."""
        last = ""
        mine = select(EmbeddingRow.series_uid, EmbeddingRow.indexed_content).where(
            EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.indexed_content.is_not(None)
        )
        while True:
            part = mine.where(EmbeddingRow.series_uid > last).order_by(EmbeddingRow.series_uid).limit(page)
            with self._database.read() as session:
                found = {uid: content or "" for uid, content in session.execute(part)}
            if not found:
                return
            yield found
            last = max(found)

    def indexed_of(self, encoder_id: str, series_uids: Collection[str]) -> dict[str, str]:
        """The same of some series."""
        mine = select(EmbeddingRow.series_uid, EmbeddingRow.indexed_content).where(
            EmbeddingRow.encoder_id == encoder_id,
            EmbeddingRow.indexed_content.is_not(None),
            EmbeddingRow.series_uid.in_(series_uids),
        )
        with self._database.read() as session:
            return {uid: content or "" for uid, content in session.execute(mine)}

    def archived(self, page: int) -> Iterator[list[Archived]]:
        """Of every series."""
        last = ""
        mine = select(SeriesRow.series_uid, SeriesRow.content, SeriesRow.received).order_by(SeriesRow.series_uid)
        while True:
            with self._database.read() as session:
                rows = session.execute(mine.where(SeriesRow.series_uid > last).limit(page))
                found = [Archived(*row) for row in rows]
            if not found:
                return
            yield found
            last = found[-1].series_uid

    def archived_now(self, series_uid: str) -> Archived | None:
        """The same of one; None where it is not here."""
        mine = select(SeriesRow.series_uid, SeriesRow.content, SeriesRow.received)
        with self._database.read() as session:
            row = session.execute(mine.where(SeriesRow.series_uid == series_uid)).one_or_none()
        return row and Archived(*row)

    def counted_bags(self, page: int) -> Iterator[dict[EmbeddingKey, str]]:
        """By its key, the content of every bag that is read."""
        last = EmbeddingKey("", "")
        order = tuple_(EmbeddingRow.series_uid, EmbeddingRow.encoder_id)
        mine = select(EmbeddingRow.series_uid, EmbeddingRow.encoder_id, EmbeddingRow.content).where(
            EmbeddingRow.content.is_not(None)
        )
        while True:
            part = mine.where(order > tuple_(last.series_uid, last.encoder_id)).order_by(
                EmbeddingRow.series_uid, EmbeddingRow.encoder_id
            )
            with self._database.read() as session:
                rows = session.execute(part.limit(page))
                found = {EmbeddingKey(uid, encoder_id): content or "" for uid, encoder_id, content in rows}
            if not found:
                return
            yield found
            last = list(found)[-1]

    def counted(self, key: EmbeddingKey) -> Counted:
        with self._database.read() as session:
            row = session.get(EmbeddingRow, (key.series_uid, key.encoder_id))
        return Counted(row.content, row.indexed_content, row.state) if row else Counted(None, None, "")

    def waiting_for_index(self, seconds: float = 0.0) -> dict[str, int]:
        """How many bags of each encoder the index lacks, since longer than this."""
        outdated = or_(EmbeddingRow.indexed_content.is_(None), EmbeddingRow.indexed_content != EmbeddingRow.content)
        old = EmbeddingRow.embedded_at <= now() - timedelta(seconds=seconds)
        query = select(EmbeddingRow.encoder_id, func.count()).where(EmbeddingRow.content.is_not(None), outdated, old)
        with self._database.read() as session:
            found = session.execute(query.group_by(EmbeddingRow.encoder_id).order_by(EmbeddingRow.encoder_id))
            return {encoder_id: count for encoder_id, count in found}  # noqa: C416, a Row is no tuple to mypy

    def withdraw(self, key: EmbeddingKey, content: str, state: str, error: str | None = None) -> bool:
        """The bag of this content counts no longer: it is gone or damaged. Its embedding is `received`, to be made
        again, or `failed`. False where another bag counts by now."""
        mine = update(EmbeddingRow).where(
            EmbeddingRow.series_uid == key.series_uid,
            EmbeddingRow.encoder_id == key.encoder_id,
            EmbeddingRow.content == content,
        )
        none: dict[str, Any] = {"content": None, "slices": None, "embedded_at": None}
        ended = mine.where(EmbeddingRow.state.not_in(OPEN))
        with self._database.write() as session:
            changed = session.execute(
                ended.values(**none, state=state, attempts=0, holder=None, error=error, touched_at=now())
            ).rowcount  # type: ignore[attr-defined]
            changed += session.execute(mine.values(**none)).rowcount  # type: ignore[attr-defined]  # being made again
        return bool(changed)
