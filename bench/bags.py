"""Bags of real slices, half of them with one planted lesion, for measuring encoders."""

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.nodules import transplant
from bench.patients import Nodule, Series
from bench.tissue import Tissue, find_tissue
from bench.unseen import DIAMETER_MM, RECIPE, Unseen, plant_unseen

STEP_MM = 5.0  # between the slices of a bag, as nearly as the series allows
SHORTEST, LONGEST = 20, 60  # slices of a bag
LESION_SHARE = 0.1  # of a bag's slices at most
TRIES = 30
REAL = 0.25  # of the bags with a conspicuous lesion, where a real nodule of the same fold is at hand


@dataclass(frozen=True)
class Bag:
    """One bag: which slices of which series, and what was planted into them."""

    series: str
    patient: str
    slices: tuple[int, ...]  # numbers in the series
    lesion: tuple[int, ...] = ()  # places in the bag where the lesion can be seen
    changed: tuple[int, ...] = ()  # places in the bag that differ from the real slices
    planted: NDArray[np.int16] | None = None  # (changed, rows, columns) HU
    kind: str = ""
    diameter_mm: float = 0.0
    contrast_hu: float = 0.0
    conspicuous: bool = False  # the lesion, or that of the bag's partner

    @property
    def positive(self) -> bool:
        return bool(self.lesion)


class Ground:
    """One real series to plant into; its tissue is found once."""

    kept_as = ""  # before the name under which its bags are stored

    def __init__(self, series: Series) -> None:
        self.series = series
        step = max(1, round(STEP_MM / series.spacing_mm[0]))
        while step > 1 and len(range(0, len(series.hu), step)) < SHORTEST:
            step -= 1
        self.step = step
        self.spacing_mm = (series.spacing_mm[0] * step, *series.spacing_mm[1:])

    @cached_property
    def tissue(self) -> Tissue:
        """Of every slice."""
        return find_tissue(self.series.hu.astype(np.float32), self.series.spacing_mm)

    def slices(self, random: np.random.Generator) -> NDArray[np.int64]:
        """Numbers of a random run of slices, without those that show a real nodule."""
        spare = len(self.series.hu) - ((SHORTEST - 1) * self.step + 1)
        every = np.arange(int(random.integers(min(self.step, spare + 1))), len(self.series.hu), self.step)
        length = min(int(random.integers(LONGEST * 2 // 3, LONGEST + 1)), len(every))
        first = int(random.integers(len(every) - length + 1))
        chosen = every[first : first + length]
        return chosen[~np.isin(chosen, self.series.suspect_slices)]


class WholeSeries(Ground):
    """The same, where every bag is the whole series, without the slices that show a real nodule."""

    kept_as = "whole-"

    def __init__(self, series: Series) -> None:
        super().__init__(series)
        self.step, self.spacing_mm = 1, series.spacing_mm

    def slices(self, random: np.random.Generator) -> NDArray[np.int64]:
        every = np.arange(len(self.series.hu))
        return every[~np.isin(every, self.series.suspect_slices)]


def make_bags(ground: Ground, count: int, random: np.random.Generator, donors: Sequence[Nodule] = ()) -> list[Bag]:
    """Pairs of a bag with a lesion and the same slices clean, `count` bags at most; half the lesions are conspicuous.

    A clean bag is as long as its partner and lies where it does, so that neither tells them apart; it counts as
    conspicuous where its partner does. `donors` are real nodules of other patients that may be transplanted.
    """
    bags = []
    for number in range(count // 2):
        if bag := _positive(ground, number % 2 == 0, random, donors):
            bags += [bag, Bag(bag.series, bag.patient, bag.slices, conspicuous=bag.conspicuous)]
    return bags


def _positive(ground: Ground, conspicuous: bool, random: np.random.Generator, donors: Sequence[Nodule]) -> Bag | None:
    """A bag with a lesion of the wanted kind on at most a tenth of its slices, or None after many tries."""
    for _ in range(TRIES):
        numbers = ground.slices(random)
        hu = ground.series.hu[numbers].astype(np.float32)
        tissue = Tissue(*(getattr(ground.tissue, name)[numbers] for name in ("body", "lung", "soft", "fat", "bone")))
        if conspicuous and donors and random.random() < REAL:
            planted = transplant(hu, ground.spacing_mm, donors[int(random.integers(len(donors)))], random, tissue)
        else:
            planted = plant_unseen(hu, ground.spacing_mm, random, _sizes(ground, len(numbers), conspicuous), tissue)
        if (
            planted
            and planted.conspicuous == conspicuous
            and len(planted.slices) <= max(1, LESION_SHARE * len(numbers))
        ):
            return _bag(ground, numbers, planted)
    return None


def _sizes(ground: Ground, slices: int, conspicuous: bool) -> tuple[float, float]:
    """Sizes that have a chance of fitting on a tenth of the bag; the rest is left to trying."""
    longest = max(1, int(LESION_SHARE * slices)) * ground.spacing_mm[0] * 1.5
    return (8.0 if conspicuous else DIAMETER_MM[0], float(np.clip(longest, 10.0, DIAMETER_MM[1])))


def _bag(ground: Ground, numbers: NDArray[np.int64], planted: Unseen) -> Bag:
    return Bag(
        series=ground.series.name,
        patient=ground.series.patient,
        slices=tuple(map(int, numbers)),
        lesion=planted.slices,
        changed=planted.changed,
        planted=np.round(planted.hu[list(planted.changed)]).astype(np.int16),
        kind=planted.kind,
        diameter_mm=planted.diameter_mm,
        contrast_hu=planted.contrast_hu,
        conspicuous=planted.conspicuous,
    )


def kept_bags(path: Path, make: Callable[[], list[Bag]]) -> list[Bag]:
    """The bags stored at `path`, made and stored first where there are none."""
    if not path.is_file():
        bags = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {f"hu{k}": bag.planted for k, bag in enumerate(bags) if bag.planted is not None}
        facts = [{name: value for name, value in vars(bag).items() if name != "planted"} for bag in bags]
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(partial, facts=np.array(repr(facts)), **arrays)
        partial.replace(path)
    with np.load(path) as stored:
        facts = ast.literal_eval(str(stored["facts"]))
        return [Bag(**each, planted=stored.get(f"hu{k}")) for k, each in enumerate(facts)]


def plan_name(ground: Ground, seed: int, count: int, donors: Sequence[Nodule]) -> str:
    """The name under which bags are stored: everything that decides them."""
    names = "+".join(donor.patient for donor in donors)
    return f"{ground.kept_as}recipe{RECIPE}-{ground.series.name}-seed{seed}-bags{count}{'-' if names else ''}{names}"
