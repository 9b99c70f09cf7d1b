"""SQL: the rules by which a worker takes work on, and by which it counts as lost; how much may wait."""

from datetime import timedelta
from typing import NoReturn, TypeVar

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from service.errors import QueueFull
from service.storage.tables import ExportRow, HeadRow, Work, now

Kind = TypeVar("Kind", bound=Work)
MOST_WAITING = 1000  # heads, or exports; of series a setting says how many
RETRY_SECONDS = 60


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


def require_room(session: Session, kind: type[HeadRow] | type[ExportRow], most: int) -> None:
    """Raises QueueFull where as many of the kind wait for a worker as may."""
    waiting = session.scalar(select(func.count()).select_from(kind).where(kind.state.in_(("received", "queued")))) or 0
    if waiting >= most:
        refuse(waiting, most, kind.__tablename__)


def refuse(waiting: int, most: int, what: str) -> NoReturn:
    """Raises QueueFull."""
    raise QueueFull(
        f"{waiting} {what} wait for a worker, expected fewer than {most}; try again in {RETRY_SECONDS} s",
        waiting=waiting,
        retry_after_seconds=RETRY_SECONDS,
    )
