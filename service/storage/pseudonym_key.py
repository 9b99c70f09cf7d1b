"""Which key the pseudonyms of a data directory are by: the catalog has its fingerprint, never the key."""

from sqlalchemy import select

from service.pseudonyms import Pseudonyms
from service.storage.database import Database
from service.storage.tables import PseudonymKeyRow, SeriesRow

ONLY = 1


class OtherPseudonymKey(Exception):
    """What is here came under another key, or under none."""


def require_same_key(database: Database, pseudonyms: Pseudonyms | None) -> None:
    """The first key of an empty catalog stays its key. Raises OtherPseudonymKey."""
    with database.read() as session:
        row = session.get(PseudonymKeyRow, ONLY)
        kept = row.fingerprint if row else None
    if kept is None and pseudonyms is not None:
        kept = _keep(database, pseudonyms.fingerprint)
    if kept != (pseudonyms.fingerprint if pseudonyms else None):
        found = "another KEYSLICE_PSEUDONYM_KEY" if pseudonyms else "no KEYSLICE_PSEUDONYM_KEY"
        raise OtherPseudonymKey(f"{found}, expected the one that the series here came under")


def _keep(database: Database, fingerprint: str) -> str:
    with database.write() as session:
        row = session.get(PseudonymKeyRow, ONLY, with_for_update=True)
        if row is None and session.scalar(select(SeriesRow.series_uid).limit(1)) is not None:
            raise OtherPseudonymKey("the series here came without KEYSLICE_PSEUDONYM_KEY, expected an empty catalog")
        if row is None:
            row = PseudonymKeyRow(only=ONLY, fingerprint=fingerprint)
            session.add(row)
        return row.fingerprint
