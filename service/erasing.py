"""Erasure: a series, or a patient with every series, leaves every store, and the files of the stores too.

The catalog forgets it first, in the transaction that notes the erasure: nobody finds any of it afterwards. Then store
after store is emptied. Every step may run twice; what was cut short, the sweep goes on with.
"""

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from models.ct.header import NotDicom, read_header
from service.errors import BrokerDown, ErasureUnfinished, KeysliceError, StorageUnreachable
from service.indexing import LEASE as INDEX_LEASE
from service.indexing import LEASE_SECONDS as INDEX_LEASE_SECONDS
from service.indexing import rebuild
from service.queue import Queue
from service.settings import Settings
from service.storage.chain import SERVICE
from service.storage.erasures import Doomed
from service.storage.index import IndexBroken, one_of
from service.storage.leases import Held
from service.storage.staging import remove_abandoned
from service.storage.stores import Stores
from service.storage.tables import ErasureRow, IndexRow

PATIENCE_SECONDS = 60.0  # for another writer of the index, or a reader of the catalog; the sweep has as much each time
LEASE_SECONDS = 15.0  # kept alive by its holder
POLL_SECONDS = 0.05

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Eraser:
    """Everything an erasure touches."""

    stores: Stores
    queue: Queue
    settings: Settings
    who: str = SERVICE  # for the audit

    def series(self, series_uid: str) -> ErasureRow:
        """Erase a series. Raises SeriesNotFound, or ErasureUnfinished where it goes on after this."""
        return self.carry_on(self.stores.erasures.begin(series_uid=series_uid, who=self.who))

    def patient(self, patient_id: str) -> ErasureRow:
        """Erase a patient. Raises PatientNotFound, or ErasureUnfinished where it goes on after this."""
        return self.carry_on(self.stores.erasures.begin(patient_id=patient_id, who=self.who))

    def sweep(self) -> None:
        """Go on with what was cut short."""
        for erasure_id in self.stores.erasures.unfinished():
            try:
                self.carry_on(erasure_id)
            except KeysliceError as error:
                log.warning("erasure %s: %s", erasure_id, error)

    def carry_on(self, erasure_id: str) -> ErasureRow:
        """Bring an erasure to its end, whoever began it. Raises ErasureUnfinished."""
        end = time.monotonic() + PATIENCE_SECONDS
        while (row := self.stores.erasures.get(erasure_id)).erased_at is None:
            with self._lease(f"erasure {erasure_id}", end, erasure_id):
                if self.stores.erasures.get(erasure_id).erased_at is None:
                    try:
                        self._run(erasure_id, end)
                    except (BrokerDown, StorageUnreachable) as error:
                        message = f"erasure {erasure_id} goes on by itself: {error}"
                        raise ErasureUnfinished(message, erasure_id=erasure_id) from error
        return row

    def _run(self, erasure_id: str, end: float) -> None:
        erasures, marks = self.stores.erasures, None
        if not erasures.get(erasure_id).emptied:
            doomed = erasures.doomed(erasure_id)
            marks = doomed.marks
            self._files(erasure_id, doomed)
            while erasures.held(erasure_id, self.settings.stale_seconds):
                time.sleep(POLL_SECONDS)
            self._files(erasure_id, doomed)  # once more: a worker may have written the last of it
            self._index(erasure_id, doomed, end)
            self._broker(erasure_id, doomed)
            erasures.emptied(erasure_id)
        while not self.stores.database.scrub(marks):
            _wait(end, erasure_id, "a reader of the catalog")
        erasures.finish(erasure_id)

    def _files(self, erasure_id: str, doomed: Doomed) -> None:
        stores, uids = self.stores, doomed.series_uids
        stores.erasures.note(
            erasure_id,
            {
                "archive_files": sum(len(stores.archive.sop_uids(uid)) for uid in uids),
                "bags": sum(map(stores.bags.count, uids)),
                "heat_maps": sum(map(stores.heatmaps.count, uids)),
            },
        )
        for uid in uids:
            stores.archive.remove(uid)
            stores.bags.remove(uid)
            stores.heatmaps.remove(uid)
        remove_abandoned(self.settings.staging_dir)
        _remove_on_the_way(self.settings, set(uids))

    def _index(self, erasure_id: str, doomed: Doomed, end: float) -> None:
        """Out of the table that each encoder's searches use; tables that nobody uses go whole."""
        stores = self.stores
        with self._lease(INDEX_LEASE, end, erasure_id) as held:
            rows = [row for each in doomed.encoder_ids if (row := stores.indexes.get(each))]
            there = [row for row in rows if stores.index.exists(row.table_name)]
            if doomed.series_uids:
                for row in there:
                    self._leave_index(erasure_id, row, doomed.series_uids, held)
            used = {row.table_name for row in stores.indexes.all()}
            for name in set(stores.index.names()) - used:
                held.check()
                stores.index.drop(name)

    def _leave_index(self, erasure_id: str, row: IndexRow, series_uids: list[str], held: Held) -> None:
        stores = self.stores
        try:
            count = stores.index.count(row.table_name, one_of("series_uid", series_uids))
            stores.erasures.note(erasure_id, {"index_rows": count})
            if row.built_rows is not None:
                stores.indexes.unbuilt(row.encoder_id)
            stores.index.erase(row.table_name, series_uids, held.check)
        except IndexBroken as error:
            log.warning("index of %s: %s; it is made anew from the bags", row.encoder_id, error)
            rebuild(row, stores, self.settings, held)

    def _broker(self, erasure_id: str, doomed: Doomed) -> None:
        self.stores.erasures.note(erasure_id, {"messages": self.queue.forget(set(doomed.series_uids))})

    @contextmanager
    def _lease(self, name: str, end: float, erasure_id: str) -> Iterator[Held]:
        while True:
            seconds = INDEX_LEASE_SECONDS if name == INDEX_LEASE else LEASE_SECONDS
            with self.stores.leases.hold(name, f"{socket.gethostname()}:{os.getpid()}", seconds) as held:
                if held is not None:
                    yield held
                    return
            _wait(end, erasure_id, "another process at work on it" if name != INDEX_LEASE else "a writer of the index")


def _wait(end: float, erasure_id: str, what: str) -> None:
    if time.monotonic() > end:
        message = f"erasure {erasure_id} goes on by itself; it waited {PATIENCE_SECONDS:.0f} s for {what}"
        raise ErasureUnfinished(message, erasure_id=erasure_id)
    time.sleep(POLL_SECONDS)


def _remove_on_the_way(settings: Settings, series_uids: set[str]) -> None:
    """Files of these series that a dead receiver or a search by a picture has left; a living one tells of a failure."""
    folders = (settings.data_dir / "receiving", settings.staging_dir / "queries")
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        try:
            if str(read_header(path).get("SeriesInstanceUID")) in series_uids:
                path.unlink(missing_ok=True)
        except (NotDicom, OSError):
            continue
