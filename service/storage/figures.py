"""SQL: how many embeddings are in which state, and how long the oldest waits."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select

from service.storage.catalog import WAITING
from service.storage.database import Database
from service.storage.tables import EmbeddingRow, SeriesRow, now


@dataclass(frozen=True)
class EmbeddingCount:
    encoder_id: str
    state: str
    embeddings: int
    slices: int  # stored


class Figures:
    def __init__(self, database: Database) -> None:
        self._database = database

    def embedding_counts(self) -> list[EmbeddingCount]:
        """By encoder and state, in the order of both."""
        both = EmbeddingRow.encoder_id, EmbeddingRow.state
        query = select(*both, func.count(), func.sum(EmbeddingRow.slices)).group_by(*both).order_by(*both)
        with self._database.read() as session:
            rows = session.execute(query).all()
        return [EmbeddingCount(encoder_id, state, count, slices or 0) for encoder_id, state, count, slices in rows]

    def oldest_waiting(self) -> datetime | None:
        """Since when the whole series that waits longest for a worker has been waiting."""
        query = select(func.min(EmbeddingRow.touched_at)).join(
            SeriesRow, SeriesRow.series_uid == EmbeddingRow.series_uid
        )
        with self._database.read() as session:
            return session.scalar(query.where(EmbeddingRow.state.in_(WAITING), SeriesRow.whole_at <= now()))
