"""Metrics of probabilities, each over many weightings of the same cases at once, as the bootstrap asks for them."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

CALIBRATION_BINS = 15  # as Guo et al. 2017

Floats = NDArray[np.float64]
Called = NDArray[np.bool_]
Metric = Callable[[Floats, Floats, Called, Floats], Floats]


def metrics(specificity: float) -> dict[str, Metric]:
    """Every metric of a label by name.

    Each takes truth (rows,) of 0 and 1, probability (rows,), called positive (rows,) and weights (draws, rows), and
    answers (draws,); a weight counts how often a row was drawn. NaN where a draw has one class only.
    """
    return {
        "auroc": auroc,
        "auprc": auprc,
        "f1": f1,
        "brier": lambda truth, probability, _, weights: brier(truth, probability, weights),
        "ece": lambda truth, probability, _, weights: calibration_error(truth, probability, weights),
        "sensitivity": lambda truth, probability, _, weights: sensitivity(specificity, truth, probability, weights),
    }


def auroc(truth: Floats, probability: Floats, _: Called, weights: Floats) -> Floats:
    """The area under the ROC by trapezoids, so that a tie of a positive and a negative is half right."""
    tp, fp = _found(truth, probability, weights)
    areas = (np.diff(fp, axis=1) * (tp[:, 1:] + tp[:, :-1]) / 2).sum(axis=1)
    return _over(areas, tp[:, -1] * fp[:, -1])


def auprc(truth: Floats, probability: Floats, _: Called, weights: Floats) -> Floats:
    """Average precision: the precision at every threshold, weighted by the recall it adds."""
    tp, fp = _found(truth, probability, weights)
    precision = np.nan_to_num(_over(tp[:, 1:], tp[:, 1:] + fp[:, 1:]))  # nothing called adds no recall
    areas = (np.diff(tp, axis=1) * precision).sum(axis=1)
    return np.where(fp[:, -1] > 0, _over(areas, tp[:, -1]), np.nan)


def f1(truth: Floats, _: Floats, called: Called, weights: Floats) -> Floats:
    """2 TP / (2 TP + FP + FN)."""
    positive = weights @ truth
    answer = _over(2 * (weights @ (truth * called)), weights @ called + positive)
    return _with_both(answer, positive, weights)


def brier(truth: Floats, probability: Floats, weights: Floats) -> Floats:
    """The mean squared distance of probability and truth (Brier 1950, for one label)."""
    answer = weights @ (probability - truth) ** 2 / weights.sum(axis=1)
    return _with_both(answer, weights @ truth, weights)


def calibration_error(truth: Floats, probability: Floats, weights: Floats) -> Floats:
    """ECE: over 15 bins of equal width, |share of positives - mean probability|, weighted by the bin's cases.

    Guo et al. 2017, Eq. 3, with the probability of the label in place of the confidence in the predicted class.
    """
    inside = calibration_bins(probability)[:, None] == np.arange(CALIBRATION_BINS)  # (rows, bins)
    gaps = weights @ (inside * (truth - probability)[:, None])  # (draws, bins)
    return _with_both(np.abs(gaps).sum(axis=1) / weights.sum(axis=1), weights @ truth, weights)


def calibration_bins(probability: Floats) -> NDArray[np.int64]:
    """The number of the bin of each probability: 0 for [0, 1/15], k for (k/15, (k+1)/15]."""
    edges = np.arange(1, CALIBRATION_BINS) / CALIBRATION_BINS
    return np.searchsorted(edges, probability, side="left")


def sensitivity(specificity: float, truth: Floats, probability: Floats, weights: Floats) -> Floats:
    """The largest share of positives found at a threshold that leaves at least `specificity` of negatives alone."""
    tp, fp = _found(truth, probability, weights)
    allowed = (1 - specificity) * fp[:, -1:] + 1e-9
    best = np.where(fp <= allowed, tp, 0.0).max(axis=1)
    return np.where(fp[:, -1] > 0, _over(best, tp[:, -1]), np.nan)


def _found(truth: Floats, probability: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """True and false positives (draws, thresholds + 1), from nothing called to all; equal scores are called at once."""
    order = np.argsort(-probability, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True))
    nothing = np.zeros((len(weights), 1))

    def counted(of: Floats) -> Floats:
        summed = np.cumsum(weights[:, order] * of[order], axis=1)[:, ends]
        return np.concatenate([nothing, summed], axis=1)

    return counted(truth), counted(1 - truth)


def _over(a: Floats, b: Floats) -> Floats:
    """a / b, NaN where b is 0."""
    return np.divide(a, b, out=np.full_like(a, np.nan, dtype=np.float64), where=b > 0)


def _with_both(answer: Floats, positive: Floats, weights: Floats) -> Floats:
    return np.where((positive > 0) & (positive < weights.sum(axis=1)), answer, np.nan)
