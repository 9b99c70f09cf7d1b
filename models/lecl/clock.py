"""How fast a run is, and how long its network stands still for want of data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Reading:
    """Since the clock started: when the first batch had arrived."""

    seconds: float = 0.0
    waited: float = 0.0  # seconds
    images: int = 0

    def since(self, earlier: "Reading") -> "Reading":
        return Reading(self.seconds - earlier.seconds, self.waited - earlier.waited, self.images - earlier.images)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0


class Clock:
    """Counts images, seconds and those of them that the device had nothing to do.

    A GPU works through its queue while this process already asks for the next batch, so what that asking takes says
    little: its idle time is what lies between two events in its own queue, before and after the batch came.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._now = device, now
        self._started: float | None = None
        self._waited, self._images = 0.0, 0
        self._gaps: list[tuple[Any, Any]] = []  # pairs of CUDA events

    @contextmanager
    def waiting(self, images: int) -> Iterator[None]:
        """Around the call that brings so many images. The first wait, for the workers to start, is not counted."""
        before = self._mark()
        yield
        after = self._mark()
        if self._started is None:
            self._started = self._now()
        elif self._device.type == "cuda":
            self._gaps.append((before, after))
        else:
            self._waited += after - before
        self._images += images

    def read(self) -> Reading:
        """Until now. Waits for a GPU to finish what it was given."""
        if self._started is None:
            return Reading()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self._waited += sum(before.elapsed_time(after) for before, after in self._gaps) / 1000  # from ms
            self._gaps.clear()
        return Reading(self._now() - self._started, self._waited, self._images)

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return self._now()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
