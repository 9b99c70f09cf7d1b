"""Linear probes: standardised features and logistic regression, its strength chosen inside the training patients."""

import warnings

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # C of scikit-learn: one over the penalty's weight

Floats = NDArray[np.floating]


def probe_scores(
    train: Floats, truth: NDArray[np.bool_], patients: NDArray[np.str_], test: Floats, seed: int
) -> NDArray[np.float64]:
    """Log-odds of each of `test` (rows, features) by a probe fitted on `train` (rows, features) and its truth.

    Both are standardised by the training rows. Where there are more features than training rows, they are turned into
    the space that the rows span: the penalised optimum lies in it, so nothing changes but the time.
    """
    mean, spread = train.mean(axis=0), train.std(axis=0)
    scale = np.where(spread > 1e-9, spread, np.inf)  # a constant feature says nothing
    known, asked = ((each - mean) / scale for each in (train, test))
    if known.shape[1] > known.shape[0]:
        axes = np.linalg.svd(known, full_matrices=False)[2]  # (rows, features)
        known, asked = known @ axes.T, asked @ axes.T
    fitted = _fitted(known, truth, _strength(known, truth, patients, seed), seed)
    return np.asarray(fitted.decision_function(asked), np.float64)


def _strength(train: Floats, truth: NDArray[np.bool_], patients: NDArray[np.str_], seed: int) -> float:
    """The C with the best AUROC on training patients left out of the fit; the strongest penalty of the best."""
    folds = min(4, len(np.unique(patients)))
    if folds < 2:
        return STRENGTHS[1]
    splits = [
        (fit, left) for fit, left in GroupKFold(folds).split(train, truth, patients) if len(np.unique(truth[fit])) == 2
    ]
    found = []
    for strength in STRENGTHS:
        scores = [
            _fitted(train[fit], truth[fit], strength, seed).decision_function(train[left]) for fit, left in splits
        ]
        kept = [
            (truth[left], score)
            for (_, left), score in zip(splits, scores, strict=True)
            if len(np.unique(truth[left])) == 2
        ]
        found.append(np.mean([roc_auc_score(*each) for each in kept]) if kept else 0.0)
    return STRENGTHS[int(np.argmax(found))]


def _fitted(train: Floats, truth: NDArray[np.bool_], strength: float, seed: int) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # so near the optimum that ranks no longer move
        return LogisticRegression(C=strength, max_iter=300, random_state=seed).fit(train, truth)
