"""SQL: the audit, which is only ever added to, but for what has been kept long enough."""

import hmac
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, delete, func, select
from sqlalchemy.orm import Session

from service.storage.chain import FIRST, LOCK, SERVICE, Chain, Event, digest_of, written
from service.storage.database import Database, alone
from service.storage.tables import AuditRow, PatientRow, SeriesRow

TRIMMED = "audit.trimmed"  # the kind of the entry that stands for those before it
PAGE = 1000  # rows at a time: no long transaction holds the database's files


@dataclass(frozen=True)
class Verified:
    """What a walk over the whole chain found."""

    entries: int
    signed: int  # by the key that was given
    trimmed: int  # entries that are there no longer, as one that is says
    head: str | None  # SEQ:DIGEST of the last entry
    wrong: int | None = None  # the first entry that does not fit
    fault: str = ""


class Audit:
    def __init__(self, database: Database, chain: Chain) -> None:
        self._database = database
        self._chain = chain

    def append(self, events: Iterable[Event]) -> None:
        """On disk when this returns."""
        with self._database.write() as session:
            self._chain.append(session, events)

    def verify(self, head: str | None = None) -> Verified:
        """Walk the chain. `head`, SEQ:DIGEST of an earlier walk, must be in it: cut off at its end it fits too."""
        with self._database.read() as session:
            start, prev = _anchor(session)
        entries = signed = 0
        last: AuditRow | None = None
        found_head = head is None
        for row in self._rows(0):
            fault = _fault(row, start + entries, prev) or self._signature_fault(row, signed)
            if fault:
                return Verified(entries, signed, start - 1, _head(last), row.seq, fault)
            entries, prev, last = entries + 1, row.digest, row
            signed += self._chain.signs and row.signature is not None
            found_head = found_head or _head(row) == head
        if not found_head:
            wrong = int(str(head).partition(":")[0])
            return Verified(entries, signed, start - 1, _head(last), wrong, f"{head} is not in the chain")
        return Verified(entries, signed, start - 1, _head(last))

    def list(
        self, *, names: Iterable[str] = (), who: str | None = None, since: datetime | None = None, limit: int = 0
    ) -> Iterator[AuditRow]:
        """The newest entries, the oldest of them first; all where limit is 0.

        `names` are opaque keys that must all be in an entry. Keys are random: one that is in the text is in the entry.
        """
        query = select(AuditRow)
        for name in names:
            query = query.where(AuditRow.entry.contains(f'"{name}"', autoescape=True))
        if who is not None:
            query = query.where(AuditRow.entry.contains(f'"who":{json.dumps(who)}', autoescape=True))
        if since is not None:
            query = query.where(AuditRow.at >= since)
        after = 0
        if limit:
            with self._database.read() as session:
                newest = query.with_only_columns(AuditRow.seq).order_by(AuditRow.seq.desc()).limit(limit)
                after = min(session.scalars(newest), default=1) - 1
        return self._rows(after, query)

    def series_key(self, series_uid: str) -> str | None:
        with self._database.read() as session:
            return session.scalar(select(SeriesRow.series_key).where(SeriesRow.series_uid == series_uid))

    def patient_key(self, patient_id: str) -> str | None:
        with self._database.read() as session:
            return session.scalar(select(PatientRow.patient_key).where(PatientRow.patient_id == patient_id))

    def trim(self, before: datetime) -> int:
        """Remove the entries before the first that is not older; how many they were. A new one says so, and holds the
        digest that the first of the rest follows."""
        with self._database.write() as session:
            alone(session, LOCK)
            kept = session.scalar(select(func.min(AuditRow.seq)).where(AuditRow.at >= before))
            old = select(AuditRow) if kept is None else select(AuditRow).where(AuditRow.seq < kept)
            last = session.scalar(old.order_by(AuditRow.seq.desc()).limit(1))
            if last is None:
                return 0
            about = (("digest", last.digest), ("through", last.seq))
            self._chain.append(session, [Event(SERVICE, TRIMMED, about=about)])
            return session.execute(delete(AuditRow).where(AuditRow.seq <= last.seq)).rowcount  # type: ignore[attr-defined,no-any-return]

    def _rows(self, after: int, query: Select[AuditRow] | None = None) -> Iterator[AuditRow]:
        rows = (select(AuditRow) if query is None else query).order_by(AuditRow.seq).limit(PAGE)
        while True:
            with self._database.read() as session:
                page = session.scalars(rows.where(AuditRow.seq > after)).all()
            yield from page
            if len(page) < PAGE:
                return
            after = page[-1].seq

    def _signature_fault(self, row: AuditRow, signed: int) -> str:
        if not self._chain.signs:
            return ""
        if row.signature is None:
            return "it is not signed, and one before it is" if signed else ""
        right = hmac.compare_digest(row.signature, self._chain.sign(row.digest) or "")
        return "" if right else "its signature is by another key, or of another entry"


def _anchor(session: Session) -> tuple[int, str]:
    """The place of the first entry, and the digest that it follows."""
    first = session.scalar(select(func.min(AuditRow.seq)))
    if first not in (None, 1):
        trims = select(AuditRow.entry).where(AuditRow.entry.contains(f'"kind":"{TRIMMED}"', autoescape=True))
        if entry := session.scalar(trims.order_by(AuditRow.seq.desc()).limit(1)):
            about = json.loads(entry)["about"]
            return about["through"] + 1, about["digest"]
    return 1, FIRST


def _fault(row: AuditRow, place: int, prev: str) -> str:
    """What does not fit of an entry; nothing where all does."""
    if row.seq != place:
        return f"entry {place} is missing"
    if (found := digest_of(row.entry)) != row.digest:
        return f"its text has the SHA-256 {found}, expected {row.digest}"
    try:
        entry = json.loads(row.entry)
        own = entry["seq"], entry["at"]
    except (ValueError, KeyError, TypeError):
        return "its text is no entry"
    if entry.get("prev") != prev:
        return f"it follows {entry.get('prev')}, expected {prev}"
    if own != (row.seq, written(row.at)):
        return "its place or time is not the one in its text"
    return ""


def _head(row: AuditRow | None) -> str | None:
    return f"{row.seq}:{row.digest}" if row else None
