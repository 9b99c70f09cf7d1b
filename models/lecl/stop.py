"""A run that is asked to end, by a signal or by its time, ends after the step it is in."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """Whether the run shall end, and why."""

    def __init__(self, max_seconds: float | None = None) -> None:
        self._until = time.monotonic() + max_seconds if max_seconds is not None else None
        self._signal: str | None = None

    def reason(self) -> str | None:
        """None while the run goes on."""
        if self._signal:
            return self._signal
        return "its time is up" if self._until is not None and time.monotonic() >= self._until else None

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Signals of SIGNALS are noted; a second one ends the process as ever. Only a main thread can listen."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)


def leave_to_parent() -> None:
    """In a worker process: a signal may reach the whole group, and the step that the run is in still needs its workers.

    They end when the run says so, or when it is no longer there.
    """
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
