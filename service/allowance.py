"""How many requests a caller may make: a bucket each, which fills evenly and holds a minute's worth."""

import math
import time

from service.errors import TooManyRequests


class Allowance:
    """In this process's memory, for as many callers as there are keys."""

    def __init__(self, per_minute: int | None) -> None:
        self._per_minute = per_minute
        self._buckets: dict[str, tuple[float, float]] = {}  # requests left, when that was

    def take(self, caller: str, now: float | None = None) -> None:
        """One request, at `now` in seconds of a monotonic clock. Raises TooManyRequests."""
        if self._per_minute is None:
            return
        now = time.monotonic() if now is None else now
        left, when = self._buckets.get(caller, (float(self._per_minute), now))
        left = min(float(self._per_minute), left + (now - when) * self._per_minute / 60)
        self._buckets[caller] = (left - 1 if left >= 1 else left, now)
        if left < 1:
            seconds = math.ceil((1 - left) * 60 / self._per_minute)
            raise TooManyRequests(
                f"more than {self._per_minute} requests a minute; the next one in {seconds} s",
                retry_after_seconds=seconds,
            )
