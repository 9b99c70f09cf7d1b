"""Curves of one label for the report: ROC, precision-recall, calibration, risk over coverage."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from models.heads.metrics import CALIBRATION_BINS, calibration_bins

POINTS = 200  # of a curve in a report, at most

Floats = NDArray[np.float64]


def curves(truth: Floats, probability: Floats) -> dict[str, Any] | None:
    """Every curve over (rows,) truth of 0, 1, NaN for unknown; None where one class alone is known."""
    known = ~np.isnan(truth)
    truth, probability = truth[known], probability[known]
    if len(np.unique(truth)) < 2:
        return None
    fpr, tpr, roc_threshold = roc_curve(truth, probability)
    precision, recall, threshold = precision_recall_curve(truth, probability)
    return {
        "roc": _thinned(fpr=fpr, tpr=tpr, threshold=np.minimum(roc_threshold, 1.0)),  # it starts at infinity
        # From the highest threshold down, like the ROC; scikit-learn gives no threshold to recall 0.
        "pr": _thinned(recall=recall[::-1], precision=precision[::-1], threshold=np.append(threshold, 1.0)[::-1]),
        "calibration": calibration(truth, probability),
        "risk_coverage": risk_coverage(truth, probability),
    }


def calibration(truth: Floats, probability: Floats) -> dict[str, list[float]]:
    """Of each bin that holds a case: its edges, how many, their mean probability, their share of positives."""
    bins = calibration_bins(probability)
    rows = []
    for each in np.unique(bins):
        inside = bins == each
        edges = (each / CALIBRATION_BINS, (each + 1) / CALIBRATION_BINS)
        rows.append((*edges, int(inside.sum()), probability[inside].mean(), truth[inside].mean()))
    names = ("low", "high", "bags", "probability", "frequency")
    return {name: _rounded(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def risk_coverage(truth: Floats, probability: Floats) -> dict[str, Any]:
    """What abstaining buys: the share of errors among the cases that are answered, the surest first.

    A case is called by which side of 0.5 its probability lies on, and is as sure as it is far from 0.5; equally sure
    cases are answered together. Geifman and El-Yaniv 2017, arXiv:1705.08500; `aurc` is the area under the curve.
    """
    sure = np.abs(probability - 0.5)
    order = np.argsort(-sure, kind="stable")
    wrong = np.cumsum(((probability >= 0.5) != (truth == 1))[order])
    answered = np.arange(1, len(truth) + 1)
    last = np.append(np.diff(sure[order]) != 0, True)  # of the equally sure
    coverage, risk = answered[last] / len(truth), wrong[last] / answered[last]
    area = auc(np.append(0.0, coverage), np.append(risk[0], risk))
    return {**_thinned(coverage=coverage, risk=risk), "aurc": round(float(area), 4)}


def _thinned(**columns: Floats) -> dict[str, list[float]]:
    """At most POINTS of parallel columns, ends included."""
    length = len(next(iter(columns.values())))
    kept = np.unique(np.linspace(0, length - 1, min(length, POINTS)).round().astype(int))
    return {name: _rounded(column[kept]) for name, column in columns.items()}


def _rounded(column: Any) -> list[float]:
    return [round(float(each), 5) for each in column]
