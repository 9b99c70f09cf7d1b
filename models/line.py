"""The assembly line: processes fill batches, one thread runs the encoder over them, whoever asks shares them."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.ct.processes import Prepare, Processes, Slots
from models.ct.screening import Frames, SetAside
from models.load import Encoder

# One runs, one waits, two are being filled: enough to hide a slow file.
BATCHES = 4
VOLUMES = 2  # one runs while the next is prepared
TICK_SECONDS = 1.0

Answer = tuple[Any, NDArray[np.float32] | None]


@dataclass
class _Batch:
    number: int  # which part of the shared memory
    handed: list[tuple[Any, int]] = field(default_factory=list)  # items with their slots, not with a process yet
    prepared: list[Future[list[Any]]] = field(default_factory=list)  # what is said of the items, share by share
    answers: list[Future[Answer]] = field(default_factory=list)


class Line:
    """One encoder, fed by processes that prepare its input.

    `prepare(item, out)` runs in the processes: it writes an item's encoder input to `out` and answers what
    there is to say of it, or a SetAside or Frames where it has none. Several threads may embed at once; a batch that
    one leaves open the next fills.
    """

    def __init__(self, encoder: Encoder, prepare: Prepare, processes: int, silent_seconds: float) -> None:
        self.encoder = encoder
        batches = BATCHES if encoder.batch > 1 else VOLUMES
        slots = Slots(batches * encoder.batch, encoder.spec.input_shape)
        self._input = slots.array().reshape(batches, encoder.batch, *encoder.spec.input_shape)
        self._processes = Processes(processes, prepare, slots, silent_seconds)
        self._share = max(1, encoder.batch // processes)  # of a batch, that one process takes at once
        self._free = list(range(batches))
        self._open: _Batch | None = None
        self._callers = 0
        self._change = threading.Condition()
        self._full: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    def embed(self, items: Sequence[Any], note: Callable[[int], None]) -> list[Answer]:
        """For each item what preparing it answered, and its embedding (windows, dim) unless it was set aside.

        `note(done)` is called at least once a second. Raises what preparing or the network raised.
        """
        done: list[Future[Answer]] = []
        answers = []
        with self._filling():
            for item in items:
                answer = self._put(item, lambda: note(len(done)))
                answer.add_done_callback(done.append)
                answers.append(answer)
                note(len(done))
        while wait(answers, TICK_SECONDS).not_done:
            note(len(done))
        note(len(items))
        return [answer.result() for answer in answers]

    def close(self) -> None:
        self._full.put(None)
        self._thread.join()
        self._processes.close()

    @contextmanager
    def _filling(self) -> Iterator[None]:
        """While anybody has more items, an open batch is left open for them."""
        with self._change:
            self._callers += 1
        try:
            yield
        finally:
            with self._change:
                self._callers -= 1
                if self._open and not self._callers:
                    self._close_batch(self._open)

    def _put(self, item: Any, tick: Callable[[], None]) -> Future[Answer]:
        while True:
            with self._change:
                if self._open is None and self._free:
                    self._open = _Batch(self._free.pop())
                if self._open is not None:
                    return self._add(item, self._open)
                self._change.wait(TICK_SECONDS)
            tick()

    def _add(self, item: Any, batch: _Batch) -> Future[Answer]:
        answer: Future[Answer] = Future()
        batch.handed.append((item, batch.number * self.encoder.batch + len(batch.answers)))
        batch.answers.append(answer)
        if len(batch.handed) == self._share:
            self._hand_over(batch)
        if len(batch.answers) == self.encoder.batch:
            self._close_batch(batch)
        return answer

    def _hand_over(self, batch: _Batch) -> None:
        batch.prepared.append(self._processes.submit(batch.handed))
        batch.handed = []

    def _close_batch(self, batch: _Batch) -> None:
        if batch.handed:
            self._hand_over(batch)
        self._open = None
        self._full.put(batch)

    def _run(self) -> None:
        """Start on a batch before waiting for the one before it: a device is never idle between two."""
        running: Callable[[], None] | None = None
        while True:
            try:
                batch = self._full.get(block=running is None)
            except queue.Empty:
                batch = None
            else:
                if batch is None:
                    return
            if running and not (batch and all(share.done() for share in batch.prepared)):
                running()  # nothing to start yet, so nobody need wait for these answers
                running = None
            following = self._begin(batch) if batch else None
            if running:
                running()
            running = following

    def _begin(self, batch: _Batch) -> Callable[[], None]:
        """Run the encoder over a batch once it is prepared; what comes back hands out its answers."""
        wait(batch.prepared)  # all of them, lest one still writes to the batch when it is another's
        try:
            said = [answer for share in batch.prepared for answer in share.result()]
            embeddings: Callable[[], NDArray[np.float32]] | None = None
            if any(_has_input(each) for each in said):
                embeddings = self.encoder.begin(self._input[batch.number])
            return partial(_hand_out, batch, said, embeddings)
        except Exception as error:  # the callers must hear of it, and the thread must live
            return partial(_fail, batch, error)
        finally:
            with self._change:
                self._free.append(batch.number)
                self._change.notify_all()


def _has_input(said: Any) -> bool:
    return not isinstance(said, SetAside | Frames | Exception)


def _hand_out(batch: _Batch, said: list[Any], embeddings: Callable[[], NDArray[np.float32]] | None) -> None:
    try:
        rows = embeddings() if embeddings else None  # (batch, windows, dim)
    except Exception as error:
        _fail(batch, error)
        return
    for row, (each, answer) in enumerate(zip(said, batch.answers, strict=True)):
        if isinstance(each, Exception):
            answer.set_exception(each)
        else:
            answer.set_result((each, rows[row] if rows is not None and _has_input(each) else None))


def _fail(batch: _Batch, error: Exception) -> None:
    for answer in batch.answers:
        answer.set_exception(error)
