"""The bags of a cohort, one at a time, each with its receipt and what the catalog knows of its series."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import WindowNotFound
from service.storage.cohorts import CohortFilter, Member
from service.storage.stores import Stores

TRIES = 3  # of a bag that is replaced just then


@dataclass(frozen=True)
class FeatureBag:
    """A series' embeddings at the windows asked for."""

    series_uid: str
    study_uid: str
    patient: str  # the opaque key, or the id where it was asked for
    body_part: str
    manufacturer: str
    model: str
    kernel: str
    windows: Sequence[str]
    vectors: NDArray[np.float16]  # (slices, windows, dim)
    receipt: dict[str, Any]  # of the whole bag: docs/storage.md


@dataclass(frozen=True)
class Cohort:
    """What was asked for, with how much of it there is."""

    chosen: CohortFilter
    encoder_id: str
    windows: Sequence[str]  # in the encoder's order
    dim: int
    patient_ids: bool  # ids instead of opaque keys
    series: int
    slices: int


def read_cohort(cohort: Cohort, stores: Stores) -> Iterator[FeatureBag]:
    """In the order of their UIDs. A series that is erased meanwhile is left out."""
    for member in stores.cohorts.members(cohort.chosen, cohort.encoder_id):
        bag = read_bag(member, cohort.windows, stores, patient_ids=cohort.patient_ids)
        if bag is not None:
            yield bag


def read_bag(
    member: Member, windows: Sequence[str] | None, stores: Stores, *, patient_ids: bool = False
) -> FeatureBag | None:
    """The member's bag at some windows, or all; None for a series that is gone."""
    now: Member | None = member
    for _ in range(TRIES):
        if now is None:
            break
        try:
            vectors, receipt = stores.bags.get(now.key, now.content), stores.bags.receipt(now.key, now.content)
        except FileNotFoundError:  # replaced by one of more slices since the catalog was asked, or erased
            now = stores.cohorts.member(now.key)
            continue
        here = receipt["windows"]
        wanted = here if windows is None else windows
        return FeatureBag(
            series_uid=now.key.series_uid,
            study_uid=now.study_uid,
            patient=now.patient_id if patient_ids else now.patient_key,
            body_part=now.body_part,
            manufacturer=now.manufacturer,
            model=now.model,
            kernel=now.kernel,
            windows=wanted,
            vectors=vectors if wanted == here else vectors[:, picked(here, wanted)],
            receipt=receipt,
        )
    return None


def picked(here: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Where the wanted windows lie. Raises WindowNotFound."""
    for window in wanted:
        if window not in here:
            raise WindowNotFound(f"no window {window!r}, expected one of {', '.join(here)}")
    return [list(here).index(window) for window in wanted]
