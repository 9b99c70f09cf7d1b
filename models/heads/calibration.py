"""From logits to probabilities and decisions: temperatures and thresholds, chosen on validation bags."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit, log_softmax, softmax

Floats = NDArray[np.float64]

TEMPERATURES = (0.05, 20.0)  # the search's bounds
DEFAULT_THRESHOLD = 0.5


def probabilities(logits: Floats, temperature: Floats, one_of_n: bool) -> Floats:
    """(rows, labels) logits over (labels,) temperatures -> probabilities; rows of one-of-n sum to 1."""
    scaled = logits / temperature
    return np.asarray(softmax(scaled, axis=1) if one_of_n else expit(scaled))


def fit_temperatures(logits: Floats, truth: Floats, one_of_n: bool) -> Floats:
    """The temperature of each label (labels,): one for all of one-of-n, 1 where one class alone is known.

    Guo et al. 2017, arXiv:1706.04599, Sec. 4.2: the temperature with the lowest negative log-likelihood. As in
    Platt 1999 each target leaves room for a case not yet seen, or labels told apart without an error would ask
    for probabilities of 0 and 1.
    """
    labels = truth.shape[1]
    if one_of_n:
        return np.full(labels, _temperature_of_classes(logits, truth.argmax(axis=1)))
    return np.array([_temperature_of_label(logits[:, k], truth[:, k]) for k in range(labels)])


def _temperature_of_label(logits: Floats, truth: Floats) -> float:
    known = ~np.isnan(truth)
    logits, positive = logits[known], truth[known] == 1
    if positive.all() or not positive.any():
        return 1.0
    n, p = (~positive).sum(), positive.sum()
    target = np.where(positive, (p + 1) / (p + 2), 1 / (n + 2))  # Platt 1999, Sec. 2.2

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float(-(target * log_expit(scaled) + (1 - target) * log_expit(-scaled)).mean())

    return _smallest(loss)


def _temperature_of_classes(logits: Floats, truth: NDArray[np.int64]) -> float:
    counts = np.bincount(truth, minlength=logits.shape[1])
    if (counts > 0).sum() < 2:
        return 1.0
    classes = len(counts)
    target = np.repeat(1 / (counts[truth] + classes)[:, None], classes, axis=1)  # Platt's for several classes
    target[np.arange(len(truth)), truth] = (counts[truth] + 1) / (counts[truth] + classes)
    return _smallest(lambda t: float(-(target * log_softmax(logits / np.exp(t), axis=1)).sum(axis=1).mean()))


def _smallest(loss: object) -> float:
    return float(np.exp(minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded").x))


def best_threshold(probability: Floats, truth: Floats) -> float:
    """The probability from which to call a case positive so that F1 is highest on these; 0.5 with one class only.

    It lies half-way between two neighbouring cases, so that it holds for cases a little beside them.
    """
    known = ~np.isnan(truth)
    probability, positive = probability[known], truth[known] == 1
    if positive.all() or not positive.any():
        return DEFAULT_THRESHOLD
    order = np.argsort(-probability, kind="stable")
    ranked = probability[order]
    right = np.cumsum(positive[order])  # true positives if the first k + 1 are called
    f1 = 2 * right / (np.arange(1, len(ranked) + 1) + positive.sum())
    f1[:-1][ranked[:-1] == ranked[1:]] = -1.0  # equal probabilities are called together
    last = int(f1.argmax())
    below = ranked[last + 1] if last + 1 < len(ranked) else 0.0
    return float((ranked[last] + below) / 2)


def best_thresholds(probability: Floats, truth: Floats) -> Floats:
    """`best_threshold` of every label (labels,)."""
    return np.array([best_threshold(probability[:, k], truth[:, k]) for k in range(truth.shape[1])])
