"""Figures by which a bag shows that its encoder still embeds as it did."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SLICES = (
    24  # of a bag that its rank is taken of, evenly spread: it grows with their number, so it must be the same of all
)
LEAST = 20  # values without which their spread is too uncertain to measure drift by


@dataclass(frozen=True)
class BagHealth:
    norm: float  # mean length of its instances
    norm_spread: float  # standard deviation of these lengths
    effective_rank: float | None  # of SLICES slices, not centred: 1 where all are alike; None of fewer slices


def bag_health(bag: NDArray[np.floating]) -> BagHealth:
    """(slices, windows, dim), finite -> the bag's figures."""
    wide = bag.astype(np.float64)
    norms = np.linalg.norm(wide, axis=-1)
    picked = np.linspace(0, len(wide) - 1, SLICES).round().astype(int)
    rank = effective_rank(wide[picked].reshape(-1, wide.shape[-1])) if len(wide) >= SLICES else None
    return BagHealth(float(norms.mean()), float(norms.std()), rank)


def effective_rank(vectors: NDArray[np.float64]) -> float:
    """(n, dim) -> exp of the entropy of the singular values' shares, between 1 and min(n, dim).

    1 for a matrix of zeros, NaN where a value is not finite. Roy and Vetterli, "The effective rank: a measure of
    effective dimensionality", EUSIPCO 2007, Definition 1.
    """
    if not np.isfinite(vectors).all():
        return math.nan
    narrow = vectors if len(vectors) <= vectors.shape[1] else vectors.T
    values = np.sqrt(np.linalg.eigvalsh(narrow @ narrow.T).clip(min=0))  # far faster than an SVD
    if not values.any():
        return 1.0
    shares = values / values.sum()
    shares = shares[shares > 0]  # 0 log 0 is 0
    return float(np.exp(-(shares * np.log(shares)).sum()))


def drift(value: float, reference: Sequence[float]) -> float | None:
    """Distance from the reference's mean in its sample standard deviations; None of fewer than LEAST, or all equal."""
    spread = float(np.std(reference, ddof=1)) if len(reference) >= LEAST else 0.0
    return (value - float(np.mean(reference))) / spread if spread else None
