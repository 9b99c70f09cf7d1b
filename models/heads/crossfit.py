"""Running a plan: ensembles over its folds, and what they say of bags that they were not trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from models.heads.calibration import best_thresholds, fit_temperatures, probabilities
from models.heads.options import HeadOptions
from models.heads.protocols import Parts, Plan

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]


class Trained(Protocol):
    """One fold's head."""

    report: dict[str, Any]

    def predict(self, rows: Rows) -> tuple[Floats, Floats]:
        """Logits (rows, labels) and attention per window (rows, windows)."""


Train = Callable[[Rows, Rows, int], Trained]  # (train rows, validation rows, running number of the network)


@dataclass(frozen=True)
class Predictions:
    """What was said of some rows of the table; by fold, what each fold's head said of which of them."""

    rows: Rows
    probability: Floats  # (rows, labels)
    uncalibrated: Floats  # the same at temperature 1
    called: NDArray[np.bool_]  # positive at the threshold
    window_share: Floats  # (rows, windows)
    by_fold: list["Predictions"] = field(default_factory=list)


@dataclass(frozen=True)
class Fitted:
    """An ensemble with the temperature and threshold of each label, chosen on what its folds held out."""

    parts: Parts
    members: list[Trained]
    temperature: Floats  # (labels,)
    threshold: Floats  # (labels,)
    validation: Predictions


@dataclass(frozen=True)
class Outcome:
    deployed: Fitted
    outer: list[Fitted]
    test: Predictions | None

    @property
    def evaluated(self) -> Predictions:
        return self.test or self.deployed.validation


def run(plan: Plan, train: Train, truth: Floats, options: HeadOptions) -> Outcome:
    """Train every network of the plan. truth (rows, labels) with NaN for unknown."""
    deployed = _fit(plan.deployed, train, truth, options, 0)
    outer, first = [], plan.deployed.folds
    for parts in plan.outer:
        outer.append(_fit(parts, train, truth, options, first))
        first += parts.folds
    tested = [_tested(fitted, options) for fitted in (*outer, deployed) if len(fitted.parts.test)]
    if not tested:
        return Outcome(deployed, outer, None)
    return Outcome(deployed, outer, _joined(tested) if outer else tested[0])


def _fit(parts: Parts, train: Train, truth: Floats, options: HeadOptions, first: int) -> Fitted:
    members, held_out = [], []
    for fold, (training, validation) in enumerate(parts.each()):
        member = train(training, validation, first + fold)
        members.append(member)
        held_out.append((validation, *member.predict(validation)))
    rows = np.concatenate([each[0] for each in held_out])
    logits = np.concatenate([each[1] for each in held_out])
    temperature, threshold = _chosen(logits, truth[rows], options)
    by_fold = []
    for validation, own_logits, shares in held_out:
        # The other folds choose for this one, or the choice would have seen what it is measured on.
        others = ~np.isin(rows, validation) if len(held_out) > 1 else np.ones(len(rows), dtype=bool)
        chosen = _chosen(logits[others], truth[rows[others]], options)
        by_fold.append(_said(validation, own_logits[None], shares, *chosen, options.one_of_n))
    return Fitted(parts, members, temperature, threshold, _joined(by_fold))


def _chosen(logits: Floats, truth: Floats, options: HeadOptions) -> tuple[Floats, Floats]:
    """The temperatures (labels,) and thresholds (labels,) that suit these logits best."""
    labels = truth.shape[1]
    scaling = options.temperature_scaling
    temperature = fit_temperatures(logits, truth, options.one_of_n) if scaling else np.ones(labels)
    return temperature, best_thresholds(probabilities(logits, temperature, options.one_of_n), truth)


def _tested(fitted: Fitted, options: HeadOptions) -> Predictions:
    """The ensemble's word on its test part, and each member's own."""
    rows = fitted.parts.test
    answers = [member.predict(rows) for member in fitted.members]
    chosen = (fitted.temperature, fitted.threshold)
    logits, shares = np.stack([each[0] for each in answers]), np.stack([each[1] for each in answers])
    each_said = [
        _said(rows, logits[k : k + 1], shares[k], *chosen, options.one_of_n) for k in range(len(fitted.members))
    ]
    return _said(rows, logits, shares.mean(axis=0), *chosen, options.one_of_n, each_said)


def _said(
    rows: Rows,
    logits: Floats,  # (members, rows, labels)
    shares: Floats,
    temperature: Floats,
    threshold: Floats,
    one_of_n: bool,
    by_fold: list[Predictions] | None = None,
) -> Predictions:
    probability = np.mean([probabilities(each, temperature, one_of_n) for each in logits], axis=0)
    plain = np.mean([probabilities(each, np.ones_like(temperature), one_of_n) for each in logits], axis=0)
    return Predictions(rows, probability, plain, probability >= threshold, shares, by_fold or [])


def _joined(parts: list[Predictions]) -> Predictions:
    """Predictions of disjoint rows as one, in the order of the rows."""
    rows = np.concatenate([each.rows for each in parts])
    order = np.argsort(rows, kind="stable")

    def together(name: str) -> Any:
        return np.concatenate([getattr(each, name) for each in parts])[order]

    return Predictions(
        rows[order],
        together("probability"),
        together("uncalibrated"),
        together("called"),
        together("window_share"),
        parts,
    )
