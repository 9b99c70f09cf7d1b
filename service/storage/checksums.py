"""SQL: the SHA-256 of every file of the archive, as it arrived."""

from collections.abc import Mapping, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.storage.database import Database
from service.storage.tables import ArchiveSumRow, SeriesRow

AT_ONCE = 500  # SQLite takes a limited number of parameters


class Checksums:
    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, series_uid: str, sop_uids: Sequence[str] | None = None) -> dict[str, bytes]:
        """By SOPInstanceUID, of these instances or all; of one that arrived before there were checksums nothing."""
        with self._database.read() as session:
            return {row.sop_uid: row.sha256 for row in _rows(session, series_uid, sop_uids)}

    def note(self, series_uid: str, sums: Mapping[str, bytes]) -> None:
        """As `note()`, in a transaction of its own; nothing of a series that was erased."""
        with self._database.write() as session:
            if session.get(SeriesRow, series_uid, with_for_update={"of": SeriesRow}) is not None:
                note(session, series_uid, sums)


def note(session: Session, series_uid: str, sums: Mapping[str, bytes]) -> None:
    """These are the files' checksums, whatever was said of them before. The series' row is there."""
    known = {row.sop_uid: row for row in _rows(session, series_uid, list(sums))}
    for sop_uid, sha256 in sums.items():
        if sop_uid in known:
            known[sop_uid].sha256 = sha256
        else:
            session.add(ArchiveSumRow(series_uid=series_uid, sop_uid=sop_uid, sha256=sha256))


def _rows(session: Session, series_uid: str, sop_uids: Sequence[str] | None) -> list[ArchiveSumRow]:
    mine = select(ArchiveSumRow).where(ArchiveSumRow.series_uid == series_uid)
    if sop_uids is None:
        return [*session.scalars(mine)]
    parts = (sop_uids[start : start + AT_ONCE] for start in range(0, len(sop_uids), AT_ONCE))
    return [row for part in parts for row in session.scalars(mine.where(ArchiveSumRow.sop_uid.in_(part)))]
