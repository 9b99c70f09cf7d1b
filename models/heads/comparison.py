"""Two heads on the same patients: DeLong's test and a paired bootstrap of every metric."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, rankdata

from models.heads.evaluation import patient_draws
from models.heads.metrics import Called, Floats, metrics

COMPARED = ("auroc", "auprc", "f1", "brier")
INTERVAL_Z = float(norm.ppf(0.975))


@dataclass(frozen=True)
class Answers:
    """What a head said of one label on some rows, (rows,) each."""

    probability: Floats
    called: Called


def delong(truth: Floats, a: Floats, b: Floats) -> dict[str, float]:
    """The AUROCs of two scores on the same independent cases, their difference, its 95 % interval, z and p.

    DeLong et al. 1988 by the ranks of Sun and Xu 2014 (IEEE SPL 21(11), algorithm 2): O(n log n). Where the scores
    order the cases alike the variance of the difference is 0: then z is 0 and p is 1.
    """
    aucs, covariance = _auc_covariance(truth, np.stack([a, b]))
    difference = aucs[0] - aucs[1]
    deviation = float(np.sqrt(max(0.0, covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])))
    z = difference / deviation if deviation > 1e-12 else 0.0
    half = INTERVAL_Z * deviation
    return {
        "a": float(aucs[0]),
        "b": float(aucs[1]),
        "difference": float(difference),
        "interval_95": [float(difference - half), float(difference + half)],  # type: ignore[dict-item]
        "z": float(z),
        "p": float(2 * norm.sf(abs(z))),
    }


def _auc_covariance(truth: Floats, scores: Floats) -> tuple[Floats, Floats]:
    """scores (heads, rows) -> AUROCs (heads,) and their covariance (heads, heads)."""
    positive, negative = scores[:, truth == 1], scores[:, truth == 0]
    m, n = positive.shape[1], negative.shape[1]
    everyone = rankdata(np.concatenate([positive, negative], axis=1), axis=1)  # midranks, as ties count half
    v10 = (everyone[:, :m] - rankdata(positive, axis=1)) / n  # of each positive: the negatives below it
    v01 = 1 - (everyone[:, m:] - rankdata(negative, axis=1)) / m  # of each negative: the positives above it
    covariance = np.atleast_2d(np.cov(v10)) / m + np.atleast_2d(np.cov(v01)) / n
    return v10.mean(axis=1), covariance


def compare(
    truth: Floats, a: Answers, b: Answers, patients: NDArray[Any], specificity: float, seed: int
) -> dict[str, Any] | None:
    """a minus b on the rows (rows,) of which truth is known; None where one class alone is known.

    The bootstrap draws patients with all of their rows, the same for both. DeLong's test asks for independent
    cases, so it is None where a patient has several rows, or a class has a single case.
    """
    known = ~np.isnan(truth)
    truth, patients = truth[known], patients[known]
    counts = np.bincount(truth.astype(int), minlength=2)
    if counts.min() == 0:
        return None
    pair = [(each.probability[known], each.called[known]) for each in (a, b)]
    distinct = len(np.unique(patients))
    independent = distinct == len(patients) and counts.min() > 1
    tested = delong(truth, pair[0][0], pair[1][0]) if independent else None
    return {
        "bags": len(truth),
        "patients": distinct,
        **_differences(truth, pair, patients, specificity, seed),
        "delong": _rounded(tested) if tested else None,
    }


def _differences(
    truth: Floats, pair: list[tuple[Floats, Called]], patients: NDArray[Any], specificity: float, seed: int
) -> dict[str, Any]:
    """Of each metric: both values, their difference, its 95 % bootstrap interval and two-sided p."""
    once = np.ones((1, len(truth)))
    answer = {}
    for name in COMPARED:
        metric = metrics(specificity)[name]
        first, second = (float(metric(truth, *own, once)[0]) for own in pair)
        drawn = np.concatenate(
            [metric(truth, *pair[0], each) - metric(truth, *pair[1], each) for each in patient_draws(patients, seed)]
        )
        interval = _interval(drawn[~np.isnan(drawn)])
        answer[name] = _rounded({"a": first, "b": second, "difference": first - second, **interval})
    return answer


def _interval(drawn: Floats) -> dict[str, Any]:
    """The middle 95 %, and twice the share of draws on the other side of 0 (never 0: one draw is added)."""
    if not len(drawn):
        return {"interval_95": None, "p": None}
    side = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return {
        "interval_95": [float(edge) for edge in np.percentile(drawn, [2.5, 97.5])],
        "p": float(min(1.0, 2 * (side + 1) / (len(drawn) + 1))),
    }


def _rounded(figures: dict[str, Any]) -> dict[str, Any]:
    def four(value: Any) -> Any:
        if isinstance(value, list):
            return [four(each) for each in value]
        return None if value is None else round(value, 4)

    return {name: four(value) for name, value in figures.items()}
