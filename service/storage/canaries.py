"""SQL: the canary slice's embeddings, by which a worker shows that it still embeds as it did."""

from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import func, select

from service.storage.database import Database
from service.storage.tables import CanaryRow, now


class Canaries:
    def __init__(self, database: Database) -> None:
        self._database = database

    def record(self, encoder_id: str, embedding: NDArray[np.float32]) -> float:
        """Compare with the first embedding ever of this encoder (or become it); answers the cosine."""
        flat = embedding.astype(np.float32).reshape(-1)
        with self._database.write() as session:
            row = session.get(CanaryRow, encoder_id)
            if row is None:
                row = CanaryRow(encoder_id=encoder_id, reference=flat.tobytes())
                session.add(row)
            a, b = flat.astype(np.float64), np.frombuffer(row.reference, dtype=np.float32).astype(np.float64)
            row.cosine = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            row.checked_at = now()
            return row.cosine

    def reference(self, encoder_id: str) -> NDArray[np.float32] | None:
        """The first embedding ever of this encoder's canary, flat; None before that."""
        with self._database.read() as session:
            row = session.get(CanaryRow, encoder_id)
        return None if row is None else np.frombuffer(row.reference, dtype=np.float32)

    def last(self) -> tuple[datetime, float] | None:
        """When any worker last embedded its canary, and the lowest cosine among encoders."""
        with self._database.read() as session:
            when, cosine = session.execute(select(func.max(CanaryRow.checked_at), func.min(CanaryRow.cosine))).one()
        return None if when is None else (when, cosine)
