"""Why a head said what it said: key slices along the body, and whether attention is to be believed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.heads.run import HeadRunner, Reading

REMOVED_SHARE = 0.1  # of the instances
DRAWS = 20
APART_MM = 10.0


@dataclass(frozen=True)
class Faithfulness:
    """What becomes of the probabilities without the most attended instances, and without as many random ones."""

    removed: int  # instances
    instances: int
    draws: int
    seed: int
    whole: NDArray[np.float32]  # (labels,), nothing removed
    without_top: NDArray[np.float32]  # (labels,)
    without_random: NDArray[np.float32]  # (labels,), the mean over the draws
    without_random_std: NDArray[np.float32]  # (labels,), over the draws


def faithfulness(
    runner: HeadRunner,
    bag: NDArray[np.float16],
    reading: Reading,
    share: float = REMOVED_SHARE,
    draws: int = DRAWS,
    seed: int = 0,
) -> Faithfulness | None:
    """Deletion of the top instances of a bag (slices, windows, dim) against random deletion of as many.

    After Samek et al. 2017, "Evaluating the visualization of what a deep neural network has learned". A
    head whose attention names what it relies on moves further without the top instances. `share` of the
    instances is removed, at least one and never all; None for a bag of one instance. The draws are without
    replacement and the same for the same seed.
    """
    attention = reading.attention.reshape(-1)
    count = len(attention)
    if count < 2:
        return None
    removed = min(max(1, round(share * count)), count - 1)
    random = np.random.default_rng(seed)
    runs = np.zeros((1 + draws, count), np.bool_)
    runs[0, np.argsort(-attention, kind="stable")[:removed]] = True
    for run in runs[1:]:
        run[random.choice(count, removed, replace=False)] = True
    without = runner.without(bag, runs)  # (runs, labels)
    return Faithfulness(
        removed=removed,
        instances=count,
        draws=draws,
        seed=seed,
        whole=reading.probabilities,
        without_top=without[0],
        without_random=without[1:].mean(axis=0),
        without_random_std=without[1:].std(axis=0),
    )


def spread(by_fold: NDArray[np.float32]) -> NDArray[np.float32]:
    """Standard deviation over the first axis, the folds, as of a sample; 0 for one fold."""
    return np.asarray(by_fold.std(axis=0, ddof=1 if len(by_fold) > 1 else 0))


def key_slices(
    weights: NDArray[np.float32], series: Sequence[str], z_mm: Sequence[float], most: int, apart_mm: float = APART_MM
) -> list[int]:
    """At most `most` rows of `weights` (slices,), the heaviest first, none near a heavier one of its series.

    Non-maximum suppression along z: a slice less than `apart_mm` from one already chosen in the same series
    is passed over. Positions of different series do not compare.
    """
    chosen: list[int] = []
    for k in map(int, np.argsort(-weights, kind="stable")):
        if len(chosen) == most:
            break
        if all(series[k] != series[other] or abs(z_mm[k] - z_mm[other]) >= apart_mm for other in chosen):
            chosen.append(k)
    return chosen
