"""SQL: tags that users give to series."""

from collections.abc import Iterable

from sqlalchemy import delete, select

from service.errors import SeriesNotFound
from service.storage.database import Database
from service.storage.tables import SeriesRow, SeriesTagRow


class Tags:
    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, series_uid: str) -> list[str]:
        """In alphabetical order. Raises SeriesNotFound."""
        mine = select(SeriesTagRow.tag).where(SeriesTagRow.series_uid == series_uid).order_by(SeriesTagRow.tag)
        with self._database.read() as session:
            if session.get(SeriesRow, series_uid) is None:
                raise SeriesNotFound(f"no series {series_uid}")
            return list(session.scalars(mine))

    def visible(self, series_uid: str, tags: Iterable[str]) -> None:
        """Raises SeriesNotFound for a series that has none of these tags, as for one that is not here."""
        mine = SeriesTagRow.series_uid == series_uid, SeriesTagRow.tag.in_([*tags])
        with self._database.read() as session:
            if session.scalar(select(SeriesTagRow.tag).where(*mine).limit(1)) is None:
                raise SeriesNotFound(f"no series {series_uid}")

    def put(self, series_uid: str, tags: Iterable[str]) -> None:
        """These and no others. Raises SeriesNotFound."""
        with self._database.write() as session:
            if session.get(SeriesRow, series_uid, with_for_update={"of": SeriesRow}) is None:
                raise SeriesNotFound(f"no series {series_uid}")
            session.execute(delete(SeriesTagRow).where(SeriesTagRow.series_uid == series_uid))
            session.add_all(SeriesTagRow(series_uid=series_uid, tag=tag) for tag in sorted(set(tags)))
