"""The linear probe: logistic regression on the mean of a bag's slices, the simplest head there is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from models.heads.loader import Bags

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

ITERATIONS = 1000
UNSEEN = -30.0  # logit of a class that no training bag is of


def bag_means(bags: Bags) -> NDArray[np.float32]:
    """(bags, windows * dim): the mean over the slices at each window."""
    means = [bags[row].float().reshape(-1, bags.windows * bags.dim).mean(dim=0).numpy() for row in range(len(bags))]
    return np.stack(means)


class Probe:
    """A member like a trained network, without attention."""

    def __init__(self, features: NDArray[np.float32], columns: Sequence[Any], report: dict[str, Any]) -> None:
        self.report = report
        self._features = features
        self._columns = columns

    def predict(self, rows: Rows) -> tuple[Floats, Floats]:
        """Logits (rows, labels); the share of attention per window has no meaning here and is (rows, 0)."""
        logits = np.concatenate([column(self._features[rows]) for column in self._columns], axis=1)
        return logits, np.empty((len(rows), 0))


def train_probe(
    features: NDArray[np.float32], targets: Floats, train: Rows, validation: Rows, one_of_n: bool, seed: int
) -> Probe:
    """Fit scikit-learn's logistic regression (C = 1) on standardised features of the rows `train`.

    One per label on the rows where it is known; a multinomial one for one-of-n. It has nothing to stop early.
    """
    if one_of_n:
        columns = [_multinomial(features[train], targets[train].argmax(axis=1), targets.shape[1], seed)]
    else:
        columns = [_binary(features[train], column[train], seed) for column in targets.T]
    return Probe(features, columns, {"train_bags": len(train), "validation_bags": len(validation), "seed": seed})


def _fitted(features: NDArray[np.float32], truth: NDArray[Any], seed: int) -> Any:
    regression = LogisticRegression(max_iter=ITERATIONS, random_state=seed)
    return make_pipeline(StandardScaler(), regression).fit(features, truth)


def _binary(features: NDArray[np.float32], truth: Floats, seed: int) -> Any:
    known = ~np.isnan(truth)
    positives, bags = truth[known].sum(), known.sum()
    if positives in (0, bags):  # one class: Laplace's rule is all there is to say
        logit = np.log((positives + 1) / (bags - positives + 1))
        return lambda rows: np.full((len(rows), 1), logit)
    model = _fitted(features[known], truth[known].astype(int), seed)
    return lambda rows: model.decision_function(rows).astype(np.float64)[:, None]


def _multinomial(features: NDArray[np.float32], truth: NDArray[Any], classes: int, seed: int) -> Any:
    seen = np.unique(truth)
    model = _fitted(features, truth, seed) if len(seen) > 1 else None

    def logits(rows: NDArray[np.float32]) -> Floats:
        answer = np.full((len(rows), classes), UNSEEN)
        if model is None:
            answer[:, seen] = 0.0
        elif len(seen) == 2:  # scikit-learn answers with one column
            answer[:, seen[0]], answer[:, seen[1]] = 0.0, model.decision_function(rows)
        else:
            answer[:, seen] = model.decision_function(rows)
        return answer

    return logits
