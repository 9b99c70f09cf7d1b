"""Figures with 95 % intervals that resample patients, not slices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Figure:
    """A value and the interval that holds 95 % of the bootstrap's draws; NaN where nothing can be said."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "-" if np.isnan(self.value) else f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


NOTHING = Figure(float("nan"), float("nan"), float("nan"))


def auroc(truth: Any, score: Any, patients: Any, run: Any) -> Figure:
    """Probability that a positive scores above a negative of the same run, ties half.

    Two runs (another seed, another held-out fold) are two models, whose scores are not comparable; so only pairs
    within a run count. A draw of patients weighs a pair of two patients by the product of how often they were drawn,
    a pair of one patient by how often that one was: two copies of a patient do not make a pair of patients.
    """
    truth, score, patients, run = (
        np.asarray(truth, bool),
        np.asarray(score, float),
        np.asarray(patients),
        np.asarray(run),
    )
    names, owner = np.unique(patients, return_inverse=True)
    wins, pairs = np.zeros((2, len(names), len(names)))
    for each in np.unique(run):
        positive, negative = np.flatnonzero((run == each) & truth), np.flatnonzero((run == each) & ~truth)
        above = np.sign(score[positive][:, None] - score[negative][None]) / 2 + 0.5
        rows, columns = np.broadcast_arrays(owner[positive][:, None], owner[negative][None])
        np.add.at(wins, (rows, columns), above)
        np.add.at(pairs, (rows, columns), 1.0)

    def weighed(times: Floats) -> tuple[float, float]:
        weights = np.outer(times, times)
        np.fill_diagonal(weights, times)
        return float((weights * wins).sum()), float((weights * pairs).sum())

    return _bootstrap(len(names), weighed)


def mean(values: Any, patients: Any) -> Figure:
    """The mean of the values."""
    return ratio(values, np.ones(len(np.asarray(values))), patients)


def ratio(values: Any, weights: Any, patients: Any) -> Figure:
    """Sum of the values over sum of the weights."""
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    above = np.bincount(owner, np.asarray(values, float), len(names))
    below = np.bincount(owner, np.asarray(weights, float), len(names))
    return _bootstrap(len(names), lambda times: (times @ above, times @ below))


def _bootstrap(patients: int, figure: Callable[[Floats], tuple[float, float]]) -> Figure:
    """`figure(times)` -> numerator, denominator, where patient k counts times[k] times."""
    top, bottom = figure(np.ones(patients))
    if not bottom:
        return NOTHING
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(DRAWS):
        times = np.bincount(random.integers(patients, size=patients), minlength=patients).astype(float)
        above, below = figure(times)
        if below:
            drawn.append(above / below)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Figure(float(top / bottom), float(low), float(high))
