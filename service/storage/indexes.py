"""SQL: which bags are in which Lance table, and what is known of each encoder's index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import and_, func, or_, select, update

from models.health import BagHealth
from service.storage.database import Database
from service.storage.index import Effort, SliceIndex
from service.storage.keys import EmbeddingKey
from service.storage.tables import EmbeddingRow, IndexRow, PooledRow, SeriesRow, now

MEAN = "mean"


@dataclass(frozen=True)
class Indexed:
    """A bag whose rows are in the table."""

    key: EmbeddingKey
    content: str
    rows: int
    mean: NDArray[np.float16]  # the series in one vector
    health: BagHealth


@dataclass(frozen=True)
class Measured:
    """What an ANN index finds of the true neighbours of stored vectors."""

    rows: int
    queries: int
    recall: float  # at 10, of the effort, or the best of those tried
    effort: Effort | None  # None: none of those tried finds enough
    tried: list[dict[str, float]]
    seconds: float  # the index took to build


class Indexes:
    """What the catalog knows of the index. Each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, encoder_id: str) -> IndexRow | None:
        with self._database.read() as session:
            return session.get(IndexRow, encoder_id)

    def all(self) -> list[IndexRow]:
        with self._database.read() as session:
            return list(session.scalars(select(IndexRow).order_by(IndexRow.encoder_id)))

    def encoders(self) -> list[str]:
        """Those with a bag."""
        query = select(EmbeddingRow.encoder_id).where(EmbeddingRow.content.is_not(None)).distinct()
        with self._database.read() as session:
            return sorted(session.scalars(query))

    def started(self, encoder_id: str) -> IndexRow:
        """The encoder's index; a new one of a table that is still to be written."""
        with self._database.write() as session:
            row = session.get(IndexRow, encoder_id)
            if row is None:
                row = IndexRow(encoder_id=encoder_id, table_name=SliceIndex.new_name(encoder_id))
                session.add(row)
            return row

    def not_indexed(self, limit: int) -> list[tuple[EmbeddingKey, str]]:
        """Embeddings whose rows are missing or outdated in the index, with the content that counts."""
        outdated = or_(EmbeddingRow.indexed_content.is_(None), EmbeddingRow.indexed_content != EmbeddingRow.content)
        query = select(EmbeddingRow).where(EmbeddingRow.content.is_not(None), outdated)
        with self._database.read() as session:
            rows = session.scalars(query.order_by(EmbeddingRow.encoder_id, EmbeddingRow.embedded_at).limit(limit))
            return [(EmbeddingKey(row.series_uid, row.encoder_id), row.content or "") for row in rows]

    def embedded(self, encoder_id: str) -> dict[str, str]:
        """The content that counts of every series with a bag of this encoder."""
        query = select(EmbeddingRow.series_uid, EmbeddingRow.content)
        with self._database.read() as session:
            mine = query.where(EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.content.is_not(None))
            return {uid: content or "" for uid, content in session.execute(mine.order_by(EmbeddingRow.series_uid))}

    def expected(self, encoder_id: str) -> dict[str, int]:
        """How many rows of each series the table holds."""
        query = select(EmbeddingRow.series_uid, EmbeddingRow.indexed_rows)
        with self._database.read() as session:
            mine = query.where(EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.indexed_content.is_not(None))
            return {uid: rows or 0 for uid, rows in session.execute(mine)}

    def rows(self, encoder_id: str) -> int:
        """How many rows the table holds in all."""
        total = select(func.coalesce(func.sum(EmbeddingRow.indexed_rows), 0))
        mine = and_(EmbeddingRow.encoder_id == encoder_id, EmbeddingRow.indexed_content.is_not(None))
        with self._database.read() as session:
            return int(session.scalar(total.where(mine)) or 0)

    def indexed(self, group: Sequence[Indexed]) -> None:
        """These bags' rows are committed to their encoder's table."""
        with self._database.write() as session:
            for each in group:
                _note_indexed(session, each)

    def forget(self, encoder_id: str, series_uids: Sequence[str]) -> None:
        """Rows of these series are not what they should be: they are to be written again."""
        with self._database.write() as session:
            for start in range(0, len(series_uids), 500):  # SQLite takes a limited number of parameters
                _forget(session, encoder_id, EmbeddingRow.series_uid.in_(series_uids[start : start + 500]))

    def switch(self, encoder_id: str, table_name: str, group: Sequence[Indexed], measured: Measured | None) -> None:
        """From now on searches use this table, which holds these bags."""
        with self._database.write() as session:
            row = session.get_one(IndexRow, encoder_id, with_for_update=True)
            row.table_name, row.broken = table_name, False
            _note_measured(row, measured)
            _forget(session, encoder_id)
            for each in group:
                _note_indexed(session, each)

    def measured(self, encoder_id: str, measured: Measured) -> None:
        with self._database.write() as session:
            _note_measured(session.get_one(IndexRow, encoder_id, with_for_update=True), measured)

    def unbuilt(self, encoder_id: str) -> None:
        """The ANN index goes: searches are exact until the upkeep has built another."""
        with self._database.write() as session:
            row = session.get(IndexRow, encoder_id, with_for_update=True)
            if row:
                _note_measured(row, None)

    def broken(self, encoder_id: str, table_name: str) -> None:
        """A table could not be read; nothing where searches use another one by now."""
        mine = and_(IndexRow.encoder_id == encoder_id, IndexRow.table_name == table_name)
        with self._database.write() as session:
            session.execute(update(IndexRow).where(mine).values(broken=True))

    def pooled(self, encoder_id: str, pooling: str) -> dict[str, tuple[str, NDArray[np.float16]]]:
        """Content and vector of every series pooled so."""
        mine = and_(PooledRow.encoder_id == encoder_id, PooledRow.pooling == pooling)
        query = select(PooledRow.series_uid, PooledRow.content, PooledRow.vector).where(mine)
        with self._database.read() as session:
            return {
                uid: (content, np.frombuffer(vector, np.float16)) for uid, content, vector in session.execute(query)
            }

    def pool(self, encoder_id: str, pooling: str, found: Mapping[str, tuple[str, NDArray[np.float16]]]) -> None:
        """Keep series' vectors, by their UIDs."""
        with self._database.write() as session:
            # Not those of a series that was erased meanwhile.
            here = set(session.scalars(select(SeriesRow.series_uid).where(SeriesRow.series_uid.in_(found))))
            for uid, (content, vector) in found.items():
                if uid not in here:
                    continue
                session.merge(_pooled(EmbeddingKey(uid, encoder_id), pooling, content, vector))


def _note_indexed(session: Any, each: Indexed) -> None:
    row = session.get(EmbeddingRow, (each.key.series_uid, each.key.encoder_id), with_for_update=True)
    if row is None:  # erased meanwhile; the next upkeep takes its rows out
        return
    row.indexed_content, row.indexed_rows = each.content, each.rows
    row.norm, row.norm_spread = each.health.norm, each.health.norm_spread
    row.effective_rank = each.health.effective_rank
    if row.state == "embedded" and row.content == each.content:
        row.state = "indexed"
    session.merge(_pooled(each.key, MEAN, each.content, each.mean))


def _forget(session: Any, encoder_id: str, *which: Any) -> None:
    mine = update(EmbeddingRow).where(EmbeddingRow.encoder_id == encoder_id, *which)
    session.execute(mine.values(indexed_content=None, indexed_rows=None))
    session.execute(mine.where(EmbeddingRow.state == "indexed").values(state="embedded"))


def _note_measured(row: IndexRow, measured: Measured | None) -> None:
    row.built_rows = row.built_at = row.build_seconds = row.recall = row.nprobes = row.refine = row.measured = None
    if measured is None:
        return
    row.built_rows, row.built_at, row.build_seconds = measured.rows, now(), measured.seconds
    row.recall, row.measured = measured.recall, {"queries": measured.queries, "tried": measured.tried}
    if measured.effort:
        row.nprobes, row.refine = measured.effort.nprobes, measured.effort.refine


def _pooled(key: EmbeddingKey, pooling: str, content: str, vector: NDArray[np.float16]) -> PooledRow:
    return PooledRow(
        series_uid=key.series_uid,
        encoder_id=key.encoder_id,
        pooling=pooling,
        content=content,
        vector=vector.astype(np.float16).tobytes(),
    )
