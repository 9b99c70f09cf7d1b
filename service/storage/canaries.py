"""SQL: the canary slice's embeddings, by which a worker shows that it still embeds as it did."""

from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from service.storage.database import Database
from service.storage.tables import CanaryDayRow, CanaryRow, now

DAYS_KEPT = timedelta(days=400)
DAY = "%Y-%m-%d"


class Canaries:
    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, encoder_id: str, embedding: NDArray[np.float32]) -> float:
        """Compare with the first embedding ever of this encoder (or become it); answers the cosine."""
        flat = embedding.astype(np.float32).reshape(-1)
        with self._database.write() as session:
            row = session.get(CanaryRow, encoder_id, with_for_update=True)
            if row is None:
                row = CanaryRow(encoder_id=encoder_id, reference=flat.tobytes())
                session.add(row)
            a, b = flat.astype(np.float64), np.frombuffer(row.reference, dtype=np.float32).astype(np.float64)
            row.cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            row.checked_at = now()
            session.flush()
            _note_day(session, row)
            return row.cosine

    def reference(self, encoder_id: str) -> NDArray[np.float32] | None:
        """The first embedding ever of this encoder's canary, flat; None before that."""
        with self._database.read() as session:
            row = session.get(CanaryRow, encoder_id)
        return None if row is None else np.frombuffer(row.reference, dtype=np.float32)

    def last(self) -> tuple[datetime, float] | None:
        """When any worker last embedded its canary, and its cosine to the first."""
        with self._database.read() as session:
            row = session.scalar(select(CanaryRow).order_by(CanaryRow.checked_at.desc()).limit(1))
        return (row.checked_at, row.cosine) if row else None

    def cosines(self) -> dict[str, float]:
        """The last one of each encoder."""
        with self._database.read() as session:
            rows = session.execute(select(CanaryRow.encoder_id, CanaryRow.cosine).order_by(CanaryRow.encoder_id))
            return {encoder_id: cosine for encoder_id, cosine in rows}  # noqa: C416, a Row is no tuple to mypy

    def days(self, encoder_id: str) -> list[CanaryDayRow]:
        """In the order of time."""
        mine = select(CanaryDayRow).where(CanaryDayRow.encoder_id == encoder_id)
        with self._database.read() as session:
            return list(session.scalars(mine.order_by(CanaryDayRow.day)))


def _note_day(session: Session, row: CanaryRow) -> None:
    """The canary's row is locked: one worker at a time writes its days."""
    today = row.checked_at.strftime(DAY)
    day = session.get(CanaryDayRow, (row.encoder_id, today))
    if day is not None:
        day.lowest, day.checks = min(day.lowest, row.cosine), day.checks + 1
        return
    session.add(CanaryDayRow(encoder_id=row.encoder_id, day=today, lowest=row.cosine, checks=1))
    oldest = (row.checked_at - DAYS_KEPT).strftime(DAY)
    session.execute(delete(CanaryDayRow).where(CanaryDayRow.encoder_id == row.encoder_id, CanaryDayRow.day < oldest))
