"""SQL: the figures of bags over time, by scanner and kernel."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import func, select

from service.storage.database import Database
from service.storage.tables import EmbeddingRow, SeriesRow


@dataclass(frozen=True)
class BagFigures:
    manufacturer: str  # as the header says
    norm: float
    effective_rank: float | None


@dataclass(frozen=True)
class GroupFigures:
    """Means over the bags of one kind of scanner."""

    manufacturer: str
    kernel: str
    bags: int
    norm: float
    norm_spread: float
    effective_rank: float | None  # of those that have one


class Health:
    """Of bags that are in the index: it is there that they are measured."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def first(self, encoder_id: str, count: int) -> list[BagFigures]:
        """Of the encoder's first bags, of those that are still there."""
        return self._some(encoder_id, count, EmbeddingRow.embedded_at)

    def last(self, encoder_id: str, count: int) -> list[BagFigures]:
        """Of the encoder's newest bags."""
        return self._some(encoder_id, count, EmbeddingRow.embedded_at.desc())

    def groups(self, encoder_id: str, start: datetime, end: datetime) -> list[GroupFigures]:
        """Of the bags embedded from start to before end, by manufacturer and kernel, those with most bags first."""
        scanner = SeriesRow.manufacturer, SeriesRow.kernel
        figures = EmbeddingRow.norm, EmbeddingRow.norm_spread, EmbeddingRow.effective_rank
        query = (
            select(*scanner, func.count(), *map(func.avg, figures))
            .join(EmbeddingRow, EmbeddingRow.series_uid == SeriesRow.series_uid)
            .where(EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.norm.is_not(None))
            .where(EmbeddingRow.embedded_at >= start, EmbeddingRow.embedded_at < end)
            .group_by(*scanner)
            .order_by(func.count().desc(), *scanner)
        )
        with self._database.read() as session:
            return [GroupFigures(*row) for row in session.execute(query)]

    def _some(self, encoder_id: str, count: int, order: Any) -> list[BagFigures]:
        query = (
            select(SeriesRow.manufacturer, EmbeddingRow.norm, EmbeddingRow.effective_rank)
            .join(EmbeddingRow, EmbeddingRow.series_uid == SeriesRow.series_uid)
            .where(EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.norm.is_not(None))
        )
        with self._database.read() as session:
            rows = session.execute(query.order_by(order, EmbeddingRow.series_uid).limit(count))
            return [BagFigures(manufacturer, norm or 0.0, rank) for manufacturer, norm, rank in rows]
