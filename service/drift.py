"""How an encoder's embeddings have changed since its first bags: by month, scanner and kernel, and by its canary."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from models.health import drift
from service.storage.health import BagFigures
from service.storage.stores import Stores
from service.storage.tables import now

FIRST = 100  # bags, which later ones are compared with
MONTHS = 12  # that are told, this one included


def embedding_health(encoder_id: str, stores: Stores) -> dict[str, Any]:
    """The reference, each of the last MONTHS by manufacturer and kernel, the canary day by day."""
    reference = stores.health.first(encoder_id, FIRST)
    first_ranks = ranks(reference)
    found = [
        {
            "month": start.strftime("%Y-%m"),
            "manufacturer": group.manufacturer,
            "kernel": group.kernel,
            "bags": group.bags,
            "norm": group.norm,
            "norm_spread": group.norm_spread,
            "norm_drift": norm_drift(group.norm, reference),
            "effective_rank": group.effective_rank,
            "rank_drift": None if group.effective_rank is None else drift(group.effective_rank, first_ranks),
        }
        for start, end in _months(now())
        for group in stores.health.groups(encoder_id, start, end)
    ]
    canary = [
        {"day": each.day, "lowest_cosine": each.lowest, "checks": each.checks}
        for each in stores.canaries.days(encoder_id)
    ]
    return {"reference": _told(reference), "by_scanner": found, "canary": canary}


def norm_drift(norm: float, reference: Sequence[BagFigures]) -> float | None:
    """In standard deviations between the reference's bags."""
    return drift(norm, [each.norm for each in reference])


def ranks(bags: Sequence[BagFigures]) -> list[float]:
    """Of those that have one."""
    return [each.effective_rank for each in bags if each.effective_rank is not None]


def _told(reference: Sequence[BagFigures]) -> dict[str, Any] | None:
    if not reference:
        return None
    with_rank = ranks(reference)
    return {
        "bags": len(reference),
        "norm": fmean(each.norm for each in reference),
        "effective_rank": fmean(with_rank) if with_rank else None,
    }


def _months(today: datetime) -> Iterator[tuple[datetime, datetime]]:
    """Start and end of the last MONTHS in UTC, the newest first."""
    count = today.year * 12 + today.month - 1
    for number in range(count, count - MONTHS, -1):
        yield _start(number), _start(number + 1)


def _start(number: int) -> datetime:
    return datetime(number // 12, number % 12 + 1, 1, tzinfo=UTC)
