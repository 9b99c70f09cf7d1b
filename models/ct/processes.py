"""Processes that prepare encoder input, each writing to memory that it shares with the encoder's process."""

import ctypes
import errno
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.ct.reasons import Reason
from models.ct.screening import SetAside
from models.memory import keep_freed_memory
from models.spawn import SPAWN, end_with_parent

START_SECONDS = 120.0  # until a new process has imported what it needs, on a busy machine
ATTEMPTS = 2  # at one item, should its process die

Prepare = Callable[[Any, NDArray[np.float32]], Any]  # (item, out) -> what there is to say of it


class Slots:
    """Arrays of one shape in memory that processes share. No name of it lies anywhere, so nothing outlives a kill."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.shape = (count, *shape)
        self.memory: Any = SPAWN.RawArray(ctypes.c_float, math.prod(self.shape))

    def array(self) -> NDArray[np.float32]:
        """(count, *shape)"""
        floats: NDArray[np.float32] = np.frombuffer(self.memory, np.float32)
        return floats.reshape(self.shape)


class Processes:
    """Prepares items side by side; each process is served by a thread that starts another where it dies."""

    def __init__(self, count: int, prepare: Prepare, slots: Slots, silent_seconds: float) -> None:
        self._prepare = prepare
        self._slots = slots
        self._silent_seconds = silent_seconds
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="prepare")
        self._own = threading.local()
        self._every: list[_Process] = []

    def submit(self, work: Sequence[tuple[Any, int]]) -> Future[list[Any]]:
        """For each (item, slot), what prepare(item, slots[slot]) answers, or the error it raises.

        One process takes all of the work, and needs nobody until it is done: the interpreter of its parent may be
        busy meanwhile. An item that takes down every process that tries it is set aside.
        """
        return self._threads.submit(self._ask, work)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        for process in self._every:
            process.kill()

    def _ask(self, work: Sequence[tuple[Any, int]]) -> list[Any]:
        answers: list[Any] = []
        deaths = 0  # at the item that is next
        while len(answers) < len(work):
            process = getattr(self._own, "process", None) or self._start()
            try:
                process.send(work[len(answers) :])
                while len(answers) < len(work):
                    answers.append(process.receive(self._silent_seconds))
                    deaths = 0
            except (EOFError, OSError):
                self._end(process)
                deaths += 1
                if deaths == ATTEMPTS:
                    detail = f"its decoder died or was silent for {self._silent_seconds:.0f} s, {ATTEMPTS} times"
                    answers.append(SetAside(Reason.UNDECODABLE, detail))
                    deaths = 0
        return answers

    def _start(self) -> "_Process":
        """This thread's process, ready for work. Raises OSError: that it does not start is no item's fault."""
        process = _Process(self._prepare, self._slots)
        self._every.append(process)
        try:
            process.receive(START_SECONDS)
        except (EOFError, OSError) as error:
            self._end(process)
            raise OSError(errno.EAGAIN, "no decoding process starts") from error
        self._own.process = process
        return process

    def _end(self, process: "_Process") -> None:
        process.kill()
        self._every.remove(process)
        self._own.process = None


class _Process:
    def __init__(self, prepare: Prepare, slots: Slots) -> None:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(
            target=_serve, args=(theirs, prepare, slots.memory, slots.shape), name="prepare", daemon=True
        )
        self._process.start()
        theirs.close()  # so that its death closes the pipe

    def send(self, work: Sequence[tuple[Any, int]]) -> None:
        self._pipe.send(work)

    def receive(self, seconds: float) -> Any:
        """The next answer. Raises EOFError or OSError where the process is gone or silent."""
        if not self._pipe.poll(seconds):
            raise TimeoutError
        return self._pipe.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(pipe: Connection, prepare: Prepare, memory: Any, shape: tuple[int, ...]) -> None:
    keep_freed_memory()
    cv2.setNumThreads(1)
    end_with_parent()
    slots = np.frombuffer(memory, np.float32).reshape(shape)
    pipe.send("awake")
    while True:
        for item, slot in pipe.recv():
            pipe.send(_answer(prepare, item, slots[slot]))


def _answer(prepare: Prepare, item: Any, out: NDArray[np.float32]) -> Any:
    try:
        return prepare(item, out)
    except OSError as error:  # a disk that was away; worth another try
        return OSError(error.errno, os.strerror(error.errno or 0))
    except Exception as error:  # the message may hold what the file held
        return RuntimeError(f"{type(error).__name__} while preparing")
