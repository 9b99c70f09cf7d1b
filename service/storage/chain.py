"""The audit's chain: each entry names its predecessor by digest, so that none can be changed, left out or put between.

An entry is JSON with sorted keys and no blanks, in ASCII. Its digest is the SHA-256 of that text, and the next entry
holds it as `prev`. With a key, each digest is signed by HMAC-SHA-256 besides: who can write to the catalog but does not
have the key cannot make another chain.
"""

import hashlib
import hmac
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from service.storage.database import alone
from service.storage.tables import AuditRow, PatientRow, SeriesRow, now

Outcome = Literal["done", "denied", "refused", "failed"]

FIRST = "0" * 64  # instead of a predecessor's digest
LOCK = "audit"
AT_ONCE = 500  # SQLite takes a limited number of parameters
LONGEST_NAME = 256
MOST_SERIES = 1000  # that one entry names; more are so many entries
SERVICE = "service"  # who, where nobody asked


@dataclass(frozen=True)
class Event:
    """Something that was done or tried. Names are in memory alone: what is stored has the catalog's opaque keys."""

    who: str  # key:ID, user:SUBJECT, aet:TITLE, local, command:USER, export:ID or service
    kind: str
    outcome: Outcome = "done"
    status: int | None = None  # of HTTP, or of DIMSE for C-STORE
    series_uids: tuple[str, ...] = ()
    study_uids: tuple[str, ...] = ()
    patient_ids: tuple[str, ...] = ()
    series_keys: tuple[str, ...] = ()  # where the catalog no longer knows the UIDs
    patient_keys: tuple[str, ...] = ()
    about: tuple[tuple[str, Any], ...] = ()  # ids of heads, exports, jobs; counts. Never what a caller may word freely
    times: int = field(default=1, compare=False)
    at: datetime = field(default_factory=now, compare=False)


class Chain:
    """Adds to the chain inside a transaction of somebody else's."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key

    @property
    def signs(self) -> bool:
        return self._key is not None

    def append(self, session: Session, events: Iterable[Event]) -> None:
        """Whoever else appends, in whatever process, waits until this transaction ends."""
        parts = [part for event in events for part in _parts(event)]
        if not parts:
            return
        alone(session, LOCK)
        known = _Known(session, parts)
        last = session.execute(select(AuditRow.seq, AuditRow.digest).order_by(AuditRow.seq.desc()).limit(1)).first()
        seq, prev = (last.seq, last.digest) if last else (0, FIRST)
        rows = []
        for place, part in enumerate(parts, seq + 1):
            text = canonical({**_body(part, known), "seq": place, "prev": prev})
            prev = digest_of(text)
            rows.append({"seq": place, "at": part.at, "entry": text, "digest": prev, "signature": self.sign(prev)})
        session.execute(insert(AuditRow), rows)

    def sign(self, digest: str) -> str | None:
        return hmac.new(self._key, digest.encode(), hashlib.sha256).hexdigest() if self._key is not None else None


def canonical(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def written(at: datetime) -> str:
    """A time as entries have it."""
    return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _parts(event: Event) -> Iterator[Event]:
    uids, keys = event.series_uids, event.series_keys
    yield replace(event, series_uids=uids[:MOST_SERIES], series_keys=keys[:MOST_SERIES])
    for start in range(MOST_SERIES, max(len(uids), len(keys)), MOST_SERIES):
        end = start + MOST_SERIES
        yield replace(event, series_uids=uids[start:end], series_keys=keys[start:end])


class _Known:
    """What the catalog calls the series, studies and patients of some events."""

    def __init__(self, session: Session, events: Sequence[Event]) -> None:
        self.series: dict[str, tuple[str, str]] = {}  # UID -> series key, patient key
        self.studies: dict[str, list[str]] = {}  # UID -> UIDs of its series
        self.patients: dict[str, str] = {}
        columns = (SeriesRow.series_uid, SeriesRow.study_uid, SeriesRow.series_key, SeriesRow.patient_key)
        for some in _some(name for event in events for name in event.series_uids):
            for uid, _, *keys in session.execute(select(*columns).where(SeriesRow.series_uid.in_(some))):
                self.series[uid] = keys[0], keys[1]
        for some in _some(name for event in events for name in event.study_uids):
            of_studies = select(*columns).where(SeriesRow.study_uid.in_(some)).order_by(SeriesRow.series_uid)
            for uid, study, *keys in session.execute(of_studies):
                self.series[uid] = keys[0], keys[1]
                self.studies.setdefault(study, []).append(uid)
        for some in _some(name for event in events for name in event.patient_ids):
            found = select(PatientRow.patient_id, PatientRow.patient_key).where(PatientRow.patient_id.in_(some))
            self.patients.update((patient_id, key) for patient_id, key in session.execute(found))


def _some(names: Iterable[str]) -> Iterator[list[str]]:
    """In parts that a database takes; what a caller made up, and no database can hold, is in none."""
    wanted = sorted({name for name in names if name.isprintable() and len(name) <= LONGEST_NAME})
    return (wanted[start : start + AT_ONCE] for start in range(0, len(wanted), AT_ONCE))


def _body(event: Event, known: _Known) -> dict[str, Any]:
    """The entry without its place in the chain; what is empty is left out."""
    of_studies = [uid for study in event.study_uids for uid in known.studies.get(study, [])]
    found = [known.series[uid] for uid in dict.fromkeys([*event.series_uids, *of_studies]) if uid in known.series]
    patients = [known.patients[each] for each in event.patient_ids if each in known.patients]
    asked = ((event.series_uids, known.series), (event.study_uids, known.studies), (event.patient_ids, known.patients))
    body = {
        "series": [*event.series_keys, *(key for key, _ in found)],
        "patients": [*dict.fromkeys([*event.patient_keys, *patients, *(patient for _, patient in found)])],
        "unknown": sum(name not in there for names, there in asked for name in names),
        "about": dict(event.about),
        "times": event.times if event.times > 1 else 0,
    }
    told = {name: value for name, value in body.items() if value}
    status = {} if event.status is None else {"status": event.status}
    return {"at": written(event.at), "who": event.who, "kind": event.kind, "outcome": event.outcome, **status, **told}
