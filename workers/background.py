"""Long work of a worker process, in threads of its own: in its task, it would hold a thread that series need."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

log = logging.getLogger(__name__)


class Background:
    """Work by id, a few at a time, in the order it came.

    Its message is acknowledged when it is here, not when it is done: the catalog knows of it, and the sweep finds what
    a dead worker had.
    """

    def __init__(self, name: str, at_once: int) -> None:
        self._name = name
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix=name)
        self._here: dict[str, Future[None]] = {}
        self._looking = threading.Lock()

    def start(self, id: str, work: Callable[[], None]) -> None:
        """See to it, unless this process does already."""
        with self._looking:
            self._here = {each: future for each, future in self._here.items() if not future.done()}
            if id not in self._here:
                self._here[id] = self._threads.submit(self._run, id, work)

    def close(self, seconds: float) -> None:
        """Begin nothing more, and wait so long for what has begun: it was told to end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(self._here.values(), seconds)

    def _run(self, id: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a catalog that is away: the sweep finds the work again
            log.error("%s %s: %s", self._name, id, type(error).__name__)
