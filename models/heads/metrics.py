"""How good predictions are: AUROC, AUPRC and F1 on probabilities, with patient-level bootstrap intervals."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

BOOTSTRAP_DRAWS = 500
THRESHOLD = 0.5  # of F1; choosing it on validation data needs more data than the small heads have

Floats = NDArray[np.float64]
Metric = Callable[[Floats, Floats], float]

METRICS: dict[str, Metric] = {
    "auroc": lambda truth, probability: float(roc_auc_score(truth, probability)),
    "auprc": lambda truth, probability: float(average_precision_score(truth, probability)),
    "f1": lambda truth, probability: float(f1_score(truth, probability >= THRESHOLD, zero_division=0.0)),
}


def evaluate(truth: Floats, probability: Floats, patients: NDArray[Any], seed: int) -> dict[str, Any]:
    """Every metric of one label over (bags,) truth and probability: value and 95 % interval.

    The interval resamples patients, not bags, with replacement. A metric that needs both classes is
    None where only one is there.
    """
    answer: dict[str, Any] = {"bags": len(truth), "positives": int(truth.sum())}
    if len(np.unique(truth)) < 2:
        return answer | dict.fromkeys(METRICS)
    draws = _patient_draws(truth, patients, seed)
    for name, metric in METRICS.items():
        with config_context(assume_finite=True, skip_parameter_validation=True):
            values = [metric(truth[rows], probability[rows]) for rows in draws]
        low, high = np.percentile(values, [2.5, 97.5]) if values else (np.nan, np.nan)
        interval = [round(float(low), 4), round(float(high), 4)] if values else None
        answer[name] = {"value": round(metric(truth, probability), 4), "interval_95": interval}
    return answer


def _patient_draws(truth: Floats, patients: NDArray[Any], seed: int) -> list[NDArray[np.int64]]:
    """Row numbers of BOOTSTRAP_DRAWS resamples of patients; draws with one class only say nothing and are left out."""
    random = np.random.default_rng(seed)
    rows_of = [np.flatnonzero(patients == patient) for patient in np.unique(patients)]
    draws = []
    for _ in range(BOOTSTRAP_DRAWS):
        rows = np.concatenate([rows_of[k] for k in random.integers(len(rows_of), size=len(rows_of))])
        if len(np.unique(truth[rows])) == 2:
            draws.append(rows)
    return draws
