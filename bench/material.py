"""What all encoders are measured on: patients in folds, and planted bags for every seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np

from bench.bags import Bag, Ground, WholeSeries, kept_bags, make_bags, plan_name
from bench.patients import Series, Single, read_singles, read_volumes
from bench.regions import Axis, lung_axis


@dataclass(frozen=True)
class Plan:
    """The bags of one series for one seed."""

    name: str
    series: Series
    bags: list[Bag]


@dataclass(frozen=True)
class Material:
    series: list[Series]
    singles: list[Single]
    folds: list[frozenset[str]]  # patients, each in one fold
    plans: dict[int, list[Plan]]  # by seed
    axes: dict[str, Axis]  # by series, of those that show the top of the lungs


def gather(
    data: Path, cache: Path, folds: int, seeds: Sequence[int], bags: int, on_series: Callable[[], None]
) -> Material:
    """Everything read and planted, runs of slices as bags; `on_series()` is called after each series of each seed."""
    series, singles, groups = _patients(data, cache, folds)
    grounds = [Ground(each) for each in series]
    plans = _plans(grounds, groups, seeds, bags, cache, on_series)
    axes = {each.series.name: axis for each in grounds if (axis := lung_axis(each.series, each.tissue))}
    return Material(series, singles, groups, plans, axes)


def gather_whole(
    data: Path, cache: Path, folds: int, seeds: Sequence[int], bags: int, on_series: Callable[[], None]
) -> Material:
    """The same patients in the same folds, whole series as bags; without axes, which take long to find."""
    series, singles, groups = _patients(data, cache, folds)
    plans = _plans([WholeSeries(each) for each in series], groups, seeds, bags, cache, on_series)
    return Material(series, singles, groups, plans, {})


def dealt(volumes: Sequence[str], folds: int, singles: Sequence[str]) -> list[frozenset[str]]:
    """Patients dealt in turn, those with volumes first, so that neighbours in the list are never held out together."""
    groups: list[set[str]] = [set() for _ in range(folds)]
    for patients in (volumes, singles):
        for number, patient in enumerate(dict.fromkeys(patients)):
            groups[number % folds].add(patient)
    return [frozenset(group) for group in groups]


def _patients(data: Path, cache: Path, folds: int) -> tuple[list[Series], list[Single], list[frozenset[str]]]:
    series = read_volumes(data, cache / "unpacked")
    singles = read_singles(data, cache / "unpacked")
    return series, singles, dealt([each.patient for each in series], folds, [each.patient for each in singles])


def _plans(
    grounds: Sequence[Ground],
    folds: Sequence[frozenset[str]],
    seeds: Sequence[int],
    bags: int,
    cache: Path,
    on_series: Callable[[], None],
) -> dict[int, list[Plan]]:
    plans: dict[int, list[Plan]] = {}
    for seed in seeds:
        plans[seed] = []
        for ground in grounds:
            plans[seed].append(_plan(ground, [each.series for each in grounds], folds, seed, bags, cache))
            on_series()
    return plans


def _plan(
    ground: Ground, series: Sequence[Series], folds: Sequence[frozenset[str]], seed: int, bags: int, cache: Path
) -> Plan:
    """A patient with several series shares the bags among them."""
    patient = ground.series.patient
    own = next(fold for fold in folds if patient in fold)
    # A nodule from another fold would have been seen, in its own patient, by whoever is tested on it here.
    donors = [each.nodule for each in series if each.nodule and each.patient in own and each.patient != patient]
    count = bags // sum(each.patient == patient for each in series)
    name = plan_name(ground, seed, count, donors)
    random = np.random.default_rng([seed, crc32(ground.series.name.encode())])
    made = kept_bags(cache / "bags" / f"{name}.npz", lambda: make_bags(ground, count, random, donors))
    return Plan(name, ground.series, made)
