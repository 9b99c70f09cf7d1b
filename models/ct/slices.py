"""A slice file as encoder input: every window of it, resized, in [0, 1]."""

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.windows import Window, apply_window
from models.memory import keep_freed_memory

# Slices decoded ahead of the encoder: enough to hide one slow file, 16 MB at 224 pixels and two windows.
READ_AHEAD = 40
SILENT_SECONDS = 20.0  # far longer than any slice takes to decode
FILES_PER_MESSAGE = 16  # of small work, such as reading headers

T = TypeVar("T")


def encoder_input(hu: NDArray[np.float32], windows: tuple[Window, ...], size: int) -> NDArray[np.float32]:
    """The slice at each window, (windows, size, size) in [0, 1], resized by area averaging.

    Windowed before resizing, as the paper's code does: clipping and averaging do not commute.
    """
    resized = [cv2.resize(apply_window(hu, window), (size, size), interpolation=cv2.INTER_AREA) for window in windows]
    return np.stack(resized).astype(np.float32, copy=False)


def prepare_slice(path: Path, windows: tuple[Window, ...], size: int) -> NDArray[np.float32] | UndecodableSlice:
    """Encoder input of one file, or the error itself: an error is one of the expected answers here."""
    try:
        return encoder_input(read_hu(path), windows, size)
    except UndecodableSlice as error:
        return error


class SlicePreparer:
    """Decodes, windows and resizes in processes of its own, so that the encoder never waits and shares no GIL."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool = self._start()

    def map(self, function: Callable[[Path], T], paths: Iterable[Path]) -> Iterator[T]:
        """The function of each path, in order, worked out in the processes; raises as prepare() does."""
        with self._new_ones_if_broken():
            yield from self._pool.map(function, paths, chunksize=FILES_PER_MESSAGE)

    def prepare(
        self, paths: Iterable[Path], windows: tuple[Window, ...], size: int
    ) -> Iterator[NDArray[np.float32] | UndecodableSlice]:
        """For each path, in order, what prepare_slice answers; at most READ_AHEAD of them in memory.

        Raises BrokenProcessPool where a process died; the next call has new ones.
        """
        with self._new_ones_if_broken():
            yield from self._in_order(paths, windows, size)

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)

    @contextmanager
    def _new_ones_if_broken(self) -> Iterator[None]:
        try:
            yield
        except BrokenProcessPool:
            self._pool = self._start()
            raise

    def _start(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # forking a process that has run torch hangs
        return ProcessPoolExecutor(self._processes, mp_context=spawn, initializer=_begin_process)

    def _in_order(
        self, paths: Iterable[Path], windows: tuple[Window, ...], size: int
    ) -> Iterator[NDArray[np.float32] | UndecodableSlice]:
        ahead: deque[Future[NDArray[np.float32] | UndecodableSlice]] = deque()
        for path in paths:
            ahead.append(self._pool.submit(prepare_slice, path, windows, size))
            if len(ahead) >= READ_AHEAD:
                yield _answer(ahead.popleft())
        while ahead:
            yield _answer(ahead.popleft())


def _answer(future: "Future[T]") -> T:
    """A process killed in the middle of writing its answer leaves the pool reading for ever: silence is death."""
    try:
        return future.result(SILENT_SECONDS)
    except TimeoutError as error:
        raise BrokenProcessPool("a decoding process fell silent") from error


def _begin_process() -> None:
    keep_freed_memory()
    cv2.setNumThreads(1)
    os.nice(5)  # yield to the encoder, which is the bottleneck, whenever both want the core
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves no orphan waiting on a pipe for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(0)
