"""Notes for the audit: reads are gathered and appended by a thread, writes at once."""

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta

from sqlalchemy.exc import SQLAlchemyError

from service.storage.audit import Audit
from service.storage.chain import SERVICE, Event
from service.storage.tables import now

GATHER_SECONDS = 1.0  # what a killed process may lose of its reads
MOST_WAITING = 100_000  # events kept while the catalog is away; of more their number
TRIM_SECONDS = 24 * 3600.0

log = logging.getLogger(__name__)


class Recorder:
    """One in a process. An event that comes again before it is appended becomes one entry with its number of times."""

    def __init__(self, audit: Audit, keep_days: float | None = None, gather_seconds: float = GATHER_SECONDS) -> None:
        self._audit = audit
        self._keep = keep_days and timedelta(days=keep_days)
        self._gather_seconds = gather_seconds
        self._waiting: dict[Event, int] = {}
        self._lost = 0
        self._noting, self._appending = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()

    def note(self, events: Iterable[Event]) -> None:
        """Reads: appended within a second."""
        with self._noting:
            for event in events:
                if event in self._waiting or len(self._waiting) < MOST_WAITING:
                    self._waiting[event] = self._waiting.get(event, 0) + event.times
                else:
                    self._lost += 1

    def append(self, events: Iterable[Event]) -> None:
        """Writes, which have happened: on disk when this returns; where the catalog is away, when it is back."""
        self.note(events)
        self.flush()

    def flush(self) -> None:
        """Append what was noted until now."""
        with self._appending:
            with self._noting:
                waiting, self._waiting = self._waiting, {}
                lost, self._lost = self._lost, 0
            events = [replace(event, times=times) for event, times in waiting.items()]
            if lost:
                events.append(Event(SERVICE, "audit.lost", "failed", about=(("events", lost),)))
            if not events:
                return
            try:
                self._audit.append(events)
            except SQLAlchemyError as error:
                log.error("audit: %s; %d events wait", type(error).__name__, len(events))
                self.note(events[: len(waiting)])
                with self._noting:
                    self._lost += lost

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        trimmed_at = -TRIM_SECONDS
        while not self._over.wait(self._gather_seconds):
            try:
                self.flush()
                if self._keep and time.monotonic() - trimmed_at > TRIM_SECONDS:
                    trimmed_at = time.monotonic()
                    self._audit.trim(now() - self._keep)
            except Exception as error:  # whatever it is, the next second must be recorded
                log.error("audit: %s", type(error).__name__)
