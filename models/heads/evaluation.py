"""The figures of a head's predictions: every metric with its patient-level bootstrap interval, and over the folds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.heads.crossfit import Predictions
from models.heads.metrics import Floats, brier, calibration_error, metrics

BOOTSTRAP_DRAWS = 500
DRAWN_AT_ONCE = 2_000_000  # draws times rows, to bound memory


@dataclass(frozen=True)
class Evaluation:
    """Figures by label, and their plain mean over the labels; the keys are those of docs/heads.md."""

    labels: dict[str, dict[str, Any]]
    average: dict[str, Any]


def evaluate(
    said: Predictions, truth: Floats, patients: NDArray[Any], labels: Sequence[str], specificity: float, seed: int
) -> Evaluation:
    """Every metric of every label: value, 95 % interval, mean and standard deviation over folds.

    truth (all rows, labels) of 0, 1 and NaN for unknown; patients (all rows,). The interval resamples patients, not
    rows, with replacement: the middle 95 % of BOOTSTRAP_DRAWS values. A label of one class has None for its metrics,
    and no part in the average.
    """
    names = list(metrics(specificity))
    once = np.ones((1, len(said.rows)))
    value = _values(said, truth, specificity, once)[0]  # (labels, metrics)
    draws = patient_draws(patients[said.rows], seed)
    drawn = np.concatenate([_values(said, truth, specificity, weights) for weights in draws])
    folds = [_values(fold, truth, specificity, np.ones((1, len(fold.rows))))[0] for fold in said.by_fold]
    by_fold = np.array(folds).reshape(-1, *value.shape)  # (folds, labels, metrics)
    by_label: dict[str, dict[str, Any]] = {}
    for k, label in enumerate(labels):
        own = truth[said.rows, k]
        counts = {"bags": int((~np.isnan(own)).sum()), "positives": int(np.nansum(own))}
        figures = {name: _figure(value[k, m], drawn[:, k, m], by_fold[:, k, m]) for m, name in enumerate(names)}
        by_label[label] = counts | figures | {"uncalibrated": _uncalibrated(own, said.uncalibrated[:, k])}
    defined = ~np.isnan(value[:, 0])
    average = {
        # A draw or fold in which one of the labels has a single class would average over other labels: left out.
        name: _figure(_mean(value[defined, m]), *(_mean(each[:, defined, m]) for each in (drawn, by_fold)))
        for m, name in enumerate(names)
    }
    return Evaluation(by_label, average)


def patient_draws(patients: NDArray[Any], seed: int) -> Iterator[Floats]:
    """BOOTSTRAP_DRAWS resamples of patients with replacement, some at a time.

    Each (draws, rows): how often a row was drawn, the same for all rows of a patient (rows,).
    """
    random = np.random.default_rng(seed)
    names, number = np.unique(patients, return_inverse=True)
    at_once = max(1, DRAWN_AT_ONCE // max(1, len(patients)))
    even = np.full(len(names), 1 / len(names))
    for start in range(0, BOOTSTRAP_DRAWS, at_once):
        counts = random.multinomial(len(names), even, size=min(at_once, BOOTSTRAP_DRAWS - start))
        yield counts[:, number].astype(np.float64)


def _values(said: Predictions, truth: Floats, specificity: float, weights: Floats) -> Floats:
    """(draws, labels, metrics) over the predicted rows, weighted (draws, rows); NaN with one class."""
    answer = np.full((len(weights), truth.shape[1], len(metrics(specificity))), np.nan)
    for k, own in enumerate(truth[said.rows].T):
        known = ~np.isnan(own)
        if len(np.unique(own[known])) == 2:
            parts = (own[known], said.probability[known, k], said.called[known, k], weights[:, known])
            with np.errstate(invalid="ignore", divide="ignore"):  # a draw may hold none of the known rows
                answer[:, k] = np.stack([metric(*parts) for metric in metrics(specificity).values()], axis=1)
    return answer


def _figure(value: float, drawn: Floats, folds: Floats) -> dict[str, Any] | None:
    """`{"value", "interval_95", "over_folds"}`, or None where there is no value."""
    if np.isnan(value):
        return None
    drawn, by_fold = drawn[~np.isnan(drawn)], folds[~np.isnan(folds)]
    interval = [round(float(edge), 4) for edge in np.percentile(drawn, [2.5, 97.5])] if len(drawn) else None
    over_folds = None
    if len(by_fold):
        spread = float(by_fold.std(ddof=1)) if len(by_fold) > 1 else 0.0
        over_folds = {
            "mean": round(float(by_fold.mean()), 4),
            "std": round(spread, 4),
            "folds": [None if np.isnan(each) else round(float(each), 4) for each in folds],
        }
    return {"value": round(float(value), 4), "interval_95": interval, "over_folds": over_folds}


def _mean(values: Floats) -> Any:
    """Over the last axis; NaN where there is none."""
    return values.mean(axis=-1) if values.shape[-1] else np.full(values.shape[:-1], np.nan)


def _uncalibrated(truth: Floats, probability: Floats) -> dict[str, float] | None:
    known = ~np.isnan(truth)
    if len(np.unique(truth[known])) < 2:
        return None
    parts = (truth[known], probability[known], np.ones((1, int(known.sum()))))
    return {"brier": round(float(brier(*parts)[0]), 4), "ece": round(float(calibration_error(*parts)[0]), 4)}
