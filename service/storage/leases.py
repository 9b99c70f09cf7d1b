"""Who alone may do something, until when."""

from datetime import timedelta

from sqlalchemy.exc import IntegrityError

from service.storage.database import Database
from service.storage.tables import LeaseRow, now


class Leases:
    """A lease ends by itself when its holder dies; taking it again while holding it extends it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def take(self, name: str, holder: str, seconds: float) -> bool:
        """Take or extend the lease; False while another living holder has it."""
        try:
            with self._database.write() as session:
                row = session.get(LeaseRow, name, with_for_update=True)
                if row is None:
                    row = LeaseRow(name=name, holder=holder)
                    session.add(row)
                elif row.holder != holder and row.expires_at > now():
                    return False
                row.holder, row.expires_at = holder, now() + timedelta(seconds=seconds)
            return True
        except IntegrityError:  # two made the first row at once; the other one has it
            return False

    def release(self, name: str, holder: str) -> None:
        with self._database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row and row.holder == holder:
                session.delete(row)
