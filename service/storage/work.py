"""SQL: the rules by which a worker takes work on, and by which it counts as lost."""

from datetime import timedelta
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.storage.tables import Work, now

Kind = TypeVar("Kind", bound=Work)


def taken_on(row: Work, running: str, holder: str, stale_seconds: float, max_attempts: int) -> bool:
    """Of a locked row: it is the holder's from now on. False where it has ended, is given up, or another has it."""
    if row.state not in ("received", "queued", running):
        return False
    if row.state == running and row.touched_at > now() - timedelta(seconds=stale_seconds):
        return False
    if row.attempts >= max_attempts:
        row.state = "failed"
        row.error = f"given up after {row.attempts} attempts: {row.error or 'the worker died'}"
        return False
    row.state, row.holder, row.touched_at, row.attempts = running, holder, now(), row.attempts + 1
    return True


def lost(session: Session, kind: type[Kind], running: str, stale_seconds: float, queue_is_empty: bool) -> list[Kind]:
    """Rows whose worker fell silent or whose message is gone; they are waiting again."""
    states = [running, "received"] + (["queued"] if queue_is_empty else [])
    stale = kind.touched_at < now() - timedelta(seconds=stale_seconds)
    rows: list[Kind] = [*session.scalars(select(kind).where(kind.state.in_(states), stale))]
    for row in rows:
        row.state, row.holder, row.touched_at = "queued", None, now()
    return rows
