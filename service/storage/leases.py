"""Who alone may do something, until when."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from sqlalchemy import update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.storage.database import Database
from service.storage.tables import LeaseRow, now


class LeaseLost(Exception):
    """Another holder has the lease: nothing more may be written."""


class Held:
    """A lease in hand."""

    def __init__(self, leases: "Leases", name: str, holder: str, seconds: float) -> None:
        self._leases, self._name, self._holder, self._seconds = leases, name, holder, seconds

    def check(self) -> None:
        """Extend the lease; right before every commit. Raises LeaseLost."""
        if not self._leases.extend(self._name, self._holder, self._seconds):
            raise LeaseLost(f"the lease {self._name} went to another holder")


class Leases:
    """A lease ends by itself when its holder dies; taking it again while holding it extends it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @contextmanager
    def hold(self, name: str, holder: str, seconds: float) -> Iterator[Held | None]:
        """Take the lease and keep it alive, however long the work takes; None while another has it."""
        token = f"{holder}:{uuid.uuid4().hex[:8]}"  # a holder that lost it and takes it again is another one
        if not self.take(name, token, seconds):
            yield None
            return
        over = threading.Event()
        keeper = threading.Thread(target=self._keep, args=(name, token, seconds, over), daemon=True)
        keeper.start()
        try:
            yield Held(self, name, token, seconds)
        finally:
            over.set()
            keeper.join()
            self.release(name, token)

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

    def extend(self, name: str, holder: str, seconds: float) -> bool:
        """False where another holder took it after it had expired."""
        mine = update(LeaseRow).where(LeaseRow.name == name, LeaseRow.holder == holder)
        with self._database.write() as session:
            answer = session.execute(mine.values(expires_at=now() + timedelta(seconds=seconds)))
        return bool(answer.rowcount)  # type: ignore[attr-defined]

    def release(self, name: str, holder: str) -> None:
        with self._database.write() as session:
            row = session.get(LeaseRow, name, with_for_update=True)
            if row and row.holder == holder:
                session.delete(row)

    def _keep(self, name: str, holder: str, seconds: float, over: threading.Event) -> None:
        while not over.wait(seconds / 4):
            try:
                if not self.extend(name, holder, seconds):
                    return  # lost; the holder finds out before it commits
            except SQLAlchemyError:  # a catalog that is away; it may be back before the lease ends
                continue
