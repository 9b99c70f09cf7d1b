"""SQL: heads in training and trained, with their weights in the row, so that a head is there whole or not at all.

A head goes by its id, by `name@version`, or by its name alone, which means the version that was promoted.
"""

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, undefer

from service.errors import HeadNotFound, HeadNotReady
from service.storage.database import Database
from service.storage.tables import HeadNetworkRow, HeadRow, JobRow, now
from service.storage.work import MOST_WAITING, lost, require_room, taken_on


class Heads:
    def __init__(self, database: Database) -> None:
        self._database = database

    def add(
        self,
        encoder_id: str,
        labels: Sequence[str],
        options: dict[str, Any],
        targets: dict[str, Any],
        name: str | None = None,
    ) -> tuple[str, str]:
        """Note a head to be trained, the next version of its name. Answers (job id, head id)."""
        head_id = uuid.uuid4().hex[:12]
        head = {"encoder_id": encoder_id, "labels": list(labels), "options": options, "targets": targets}
        try:
            return self._add(head_id, name or head_id, head), head_id
        except IntegrityError:  # another training took the same version at the same moment
            return self._add(head_id, name or head_id, head), head_id

    def _add(self, head_id: str, name: str, head: dict[str, Any]) -> str:
        job_id = uuid.uuid4().hex
        with self._database.write() as session:
            require_room(session, HeadRow, MOST_WAITING)
            last = session.scalar(select(func.max(HeadRow.version)).where(HeadRow.name == name)) or 0
            row = HeadRow(head_id=head_id, name=name, version=last + 1, **head)
            row.state = "received"
            session.add(row)
            session.flush()
            session.add(JobRow(job_id=job_id, head_id=head_id))
        return job_id

    def sent(self, head_id: str) -> None:
        with self._database.write() as session:
            rows = update(HeadRow).where(HeadRow.head_id == head_id, HeadRow.state == "received")
            session.execute(rows.values(state="queued", touched_at=now()))

    def lost(self, stale_seconds: float, queue_is_empty: bool) -> list[str]:
        """Heads whose worker fell silent or whose message is gone; they are waiting again."""
        with self._database.write() as session:
            return [row.head_id for row in lost(session, HeadRow, "training", stale_seconds, queue_is_empty)]

    def claim(self, head_id: str, holder: str, stale_seconds: float, max_attempts: int) -> bool:
        """Take a head's training on; False where it is done, given up, or in a living worker's hands."""
        with self._database.write() as session:
            row = session.get(HeadRow, head_id, with_for_update=True)
            return row is not None and taken_on(row, "training", holder, stale_seconds, max_attempts)

    def progress(self, head_id: str, done: int, known: int) -> bool:
        """Epochs done of epochs known; also the sign that the worker lives. False where nobody wants the head now."""
        with self._database.note() as session:
            rows = update(HeadRow).where(HeadRow.head_id == head_id, HeadRow.state == "training")
            return bool(session.execute(rows.values(done=done, known=known, touched_at=now())).rowcount)  # type: ignore[attr-defined]

    def commit(self, head_id: str, weights: bytes, graph: bytes, report: dict[str, Any]) -> None:
        """The head is whole: this is the write that makes it count. A cancelled one stays cancelled.

        The first version of a name is promoted.
        """
        with self._database.write() as session:
            row = _versions(session, session.get_one(HeadRow, head_id).name)[head_id]
            if row.state == "cancelled":
                return
            row.weights, row.graph, row.report = weights, graph, report
            row.state, row.holder, row.error, row.done = "ready", None, None, row.known
            row.touched_at = now()
            others = exists().where(HeadRow.name == row.name, HeadRow.promoted)
            row.promoted = not session.scalar(select(others))
            _forget_networks(session, head_id)

    def promote(self, reference: str) -> HeadRow:
        """From now on the head's name alone means this version. Raises HeadNotFound or HeadNotReady."""
        head_id = self.ready(reference).head_id
        with self._database.write() as session:
            versions = _versions(session, session.get_one(HeadRow, head_id).name)
            for row in versions.values():
                row.promoted = row.head_id == head_id
            return versions[head_id]

    def release(self, head_id: str, error: str, *, counted: bool = True) -> None:
        """Hand a head's training back: the sweep sends for it again; where the attempt does not count, without end."""
        attempts = HeadRow.attempts - (0 if counted else 1)
        with self._database.write() as session:
            rows = update(HeadRow).where(HeadRow.head_id == head_id, HeadRow.state == "training")
            session.execute(
                rows.values(state="received", holder=None, error=error, touched_at=now(), attempts=attempts)
            )

    def fail(self, head_id: str, error: str) -> None:
        with self._database.write() as session:
            row = session.get_one(HeadRow, head_id)
            if row.state != "cancelled":
                row.state, row.error, row.holder, row.touched_at = "failed", error, None, now()
            _forget_networks(session, head_id)

    def networks(self, head_id: str, bags: str) -> "KeptNetworks":
        """The networks that were trained for this head on these bags (a digest of theirs)."""
        return KeptNetworks(self._database, head_id, bags)

    def get(self, reference: str) -> HeadRow:
        return self._find(reference)

    def list(self, *, after: str | None, limit: int) -> list[HeadRow]:
        query = select(HeadRow).order_by(HeadRow.head_id).limit(limit)
        if after is not None:
            query = query.where(HeadRow.head_id > after)
        with self._database.read() as session:
            return [*session.scalars(query)]

    def ready(self, reference: str) -> HeadRow:
        """A trained head, without its megabytes. Raises HeadNotFound or HeadNotReady."""
        return self._ready(reference)

    def weights(self, reference: str) -> bytes:
        """Of a trained head, as safetensors. Raises as ready() does."""
        return self._ready(reference, undefer(HeadRow.weights)).weights or b""

    def graph(self, reference: str) -> bytes:
        """Of a trained head, as ONNX. Raises as ready() does."""
        return self._ready(reference, undefer(HeadRow.graph)).graph or b""

    def _ready(self, reference: str, *options: Any) -> HeadRow:
        row = self._find(reference, *options)
        if row.state != "ready":
            raise HeadNotReady(f"head {reference} is {row.state}, expected ready", state=row.state)
        return row

    def _find(self, reference: str, *options: Any) -> HeadRow:
        name, at, version = reference.rpartition("@")
        named = select(HeadRow).options(*options)
        if at:
            named = named.where(HeadRow.name == name, HeadRow.version == _number(version))
        else:
            named = named.where(HeadRow.name == reference, HeadRow.promoted)
        with self._database.read() as session:
            row = session.get(HeadRow, reference, options=options) or session.scalar(named)
        if row is None:
            raise HeadNotFound(f"no head {reference}")
        return row


class KeptNetworks:
    """Bytes by name, as models/heads/train.py asks for them."""

    def __init__(self, database: Database, head_id: str, bags: str) -> None:
        self._database, self._head_id, self._bags = database, head_id, bags

    def get(self, name: str) -> bytes | None:
        with self._database.read() as session:
            row = session.get(HeadNetworkRow, (self._head_id, self._key(name)))
            return row.network if row else None

    def __setitem__(self, name: str, network: bytes) -> None:
        with self._database.write() as session:
            session.merge(HeadNetworkRow(head_id=self._head_id, name=self._key(name), network=network))

    def _key(self, name: str) -> str:
        return f"{self._bags}/{name}"


def _versions(session: Session, name: str) -> dict[str, HeadRow]:
    """All versions of a name by head id, locked: whoever promotes waits for whoever does so."""
    rows = session.scalars(select(HeadRow).where(HeadRow.name == name).order_by(HeadRow.version).with_for_update())
    return {row.head_id: row for row in rows}


def _forget_networks(session: Session, head_id: str) -> None:
    session.execute(delete(HeadNetworkRow).where(HeadNetworkRow.head_id == head_id))


def _number(version: str) -> int:
    """-1 for what is no version."""
    return int(version) if version.isascii() and version.isdigit() and len(version) < 10 else -1
