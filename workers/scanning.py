"""Which series the files of an export are of, from their headers, by several processes at once."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from itertools import chain, islice

from service.storage.files import ExportFile
from workers.sources import Source

BATCH = 200  # files that a process takes at once, and that are recorded at once

Unrecorded = Callable[[Sequence[ExportFile]], Sequence[ExportFile]]


def scan(source: Source, processes: int, unrecorded: Unrecorded = lambda files: files) -> Iterator[list[ExportFile]]:
    """Every file that `unrecorded` lets through, identified, some at a time; memory does not grow with their number."""
    batches = _batches(source)
    first = next(batches, [])
    following = next(batches, None)
    if following is None:  # read sooner than a process starts
        known, unknown = _parted(unrecorded(first))
        yield known + source.identify(unknown)
        return
    running: deque[Future[list[ExportFile]]] = deque()
    executor = source.executor(processes)
    try:
        for batch in chain([first, following], batches):
            known, unknown = _parted(unrecorded(batch))
            if known:
                yield known
            if unknown:
                running.append(executor.submit(source.identify, unknown))
            while len(running) > processes + 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


def _batches(source: Source) -> Iterator[list[ExportFile]]:
    entries = source.entries()
    while batch := list(islice(entries, BATCH)):
        yield batch


def _parted(files: Sequence[ExportFile]) -> tuple[list[ExportFile], list[ExportFile]]:
    """Those of which series or reason are known, and those that are to be read."""
    unknown = [file for file in files if not (file.series_uid or file.reason)]
    return [file for file in files if file.series_uid or file.reason], unknown
