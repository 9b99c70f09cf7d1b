"""SQL: heads in training and trained, with their weights in the row, so that a head is there whole or not at all."""

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import undefer

from service.errors import HeadNotFound, HeadNotReady
from service.storage.database import Database
from service.storage.tables import HeadRow, JobRow, now


class Heads:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self, encoder_id: str, labels: Sequence[str], options: dict[str, Any], targets: dict[str, Any]
    ) -> tuple[str, str]:
        """Note a head to be trained. Answers (job id, head id)."""
        head_id, job_id = uuid.uuid4().hex[:12], uuid.uuid4().hex
        with self._database.write() as session:
            head = HeadRow(
                head_id=head_id, encoder_id=encoder_id, labels=list(labels), options=options, targets=targets
            )
            head.state = "received"
            session.add(head)
            session.flush()
            session.add(JobRow(job_id=job_id, head_id=head_id))
        return job_id, head_id

    def sent(self, head_id: str) -> None:
        with self._database.write() as session:
            rows = update(HeadRow).where(HeadRow.head_id == head_id, HeadRow.state == "received")
            session.execute(rows.values(state="queued", touched_at=now()))

    def lost(self, stale_seconds: float, queue_is_empty: bool) -> list[str]:
        """Heads whose worker fell silent or whose message is gone; they are waiting again."""
        states = ["training", "received"] + (["queued"] if queue_is_empty else [])
        stale = HeadRow.touched_at < now() - timedelta(seconds=stale_seconds)
        with self._database.write() as session:
            rows = session.scalars(select(HeadRow).where(HeadRow.state.in_(states), stale)).all()
            for row in rows:
                row.state, row.holder, row.touched_at = "queued", None, now()
            return [row.head_id for row in rows]

    def claim(self, head_id: str, holder: str, stale_seconds: float, max_attempts: int) -> bool:
        """Take a head's training on; False where it is done, given up, or in a living worker's hands."""
        with self._database.write() as session:
            row = session.get(HeadRow, head_id, with_for_update=True)
            if row is None or row.state not in ("received", "queued", "training"):
                return False
            if row.state == "training" and row.touched_at > now() - timedelta(seconds=stale_seconds):
                return False
            if row.attempts >= max_attempts:
                row.state, row.error = (
                    "failed",
                    f"given up after {row.attempts} attempts: {row.error or 'the worker died'}",
                )
                return False
            row.state, row.holder, row.touched_at, row.attempts = "training", holder, now(), row.attempts + 1
            return True

    def progress(self, head_id: str, done: int, known: int) -> None:
        """Epochs done of epochs known; also the sign that the worker lives."""
        with self._database.note() as session:
            rows = update(HeadRow).where(HeadRow.head_id == head_id)
            session.execute(rows.values(done=done, known=known, touched_at=now()))

    def commit(self, head_id: str, weights: bytes, graph: bytes, report: dict[str, Any]) -> None:
        with self._database.write() as session:
            row = session.get_one(HeadRow, head_id)
            row.weights, row.graph, row.report = weights, graph, report
            row.state, row.holder, row.error, row.done = "ready", None, None, row.known

    def release(self, head_id: str, error: str) -> None:
        """Hand a head's training back, to be tried again."""
        with self._database.write() as session:
            rows = update(HeadRow).where(HeadRow.head_id == head_id, HeadRow.state == "training")
            session.execute(rows.values(state="queued", holder=None, error=error, touched_at=now()))

    def fail(self, head_id: str, error: str) -> None:
        with self._database.write() as session:
            row = session.get_one(HeadRow, head_id)
            row.state, row.error, row.holder = "failed", error, None

    def get(self, head_id: str) -> HeadRow:
        with self._database.read() as session:
            row = session.get(HeadRow, head_id)
        if row is None:
            raise HeadNotFound(f"no head {head_id}")
        return row

    def list(self, *, after: str | None, limit: int) -> list[HeadRow]:
        query = select(HeadRow).order_by(HeadRow.head_id).limit(limit)
        if after is not None:
            query = query.where(HeadRow.head_id > after)
        with self._database.read() as session:
            return [*session.scalars(query)]

    def ready(self, head_id: str) -> HeadRow:
        """A trained head with its weights. Raises HeadNotFound or HeadNotReady."""
        with self._database.read() as session:
            everything = [undefer(HeadRow.weights), undefer(HeadRow.graph)]
            row = session.get(HeadRow, head_id, options=everything)
        if row is None:
            raise HeadNotFound(f"no head {head_id}")
        if row.state != "ready":
            raise HeadNotReady(f"head {head_id} is {row.state}, expected ready", state=row.state)
        return row
