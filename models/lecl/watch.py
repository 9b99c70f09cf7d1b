"""Alarms for embeddings that collapse while a network is pretrained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.health import effective_rank

WINDOW = 1024  # embeddings looked at, the last ones
ENOUGH = 64  # embeddings, below which no alarm is raised: so few say little about a distribution
# 1 is the spread of directions drawn evenly from the sphere; at a mean cosine c between embeddings it is at most
# sqrt(1 - c). Embeddings of CT slices have 0.5 by an ImageNet network, 0.1 by a fresh one.
LOWEST_SPREAD = 0.02
LOWEST_RANK_SHARE = 0.01  # of the dimensions
LOWEST_RANK = 2.0


@dataclass(frozen=True)
class Spread:
    """How far embeddings differ from each other."""

    feature_std: float  # mean over dimensions of the L2-normalised embeddings' standard deviation, times sqrt(dim)
    effective_rank: float  # 1 (all on a line) to dim
    embeddings: int
    dim: int

    def alarm(self) -> str | None:
        """What is wrong, or None."""
        lowest_rank = max(LOWEST_RANK, LOWEST_RANK_SHARE * self.dim)
        if self.embeddings < ENOUGH:
            return None
        if not self.feature_std >= LOWEST_SPREAD:
            return (
                f"embeddings collapse: their standard deviation is {self.feature_std:.3g} of that of even directions, "
                f"expected {LOWEST_SPREAD} or more"
            )
        if not self.effective_rank >= lowest_rank:
            return (
                f"embeddings collapse: their effective rank is {self.effective_rank:.1f} of {self.dim} dimensions, "
                f"expected {lowest_rank:.1f} or more"
            )
        return None


class Watch:
    """The last embeddings of a run."""

    def __init__(self) -> None:
        self.window: Tensor | None = None  # (embeddings, dim), the oldest first

    def add(self, embeddings: Tensor) -> None:
        """(B, dim), of whatever precision and device."""
        latest = embeddings.detach().float()
        self.window = latest if self.window is None else torch.cat([self.window, latest])
        self.window = self.window[-WINDOW:]

    def spread(self) -> Spread | None:
        """None before there are two embeddings."""
        if self.window is None or len(self.window) < 2:
            return None
        directions = torch.nn.functional.normalize(self.window, dim=1)  # (N, dim)
        # A mean that all share is no collapse: both measures are taken around it.
        centred = directions - directions.mean(dim=0)
        deviation = centred.square().mean(dim=0).sqrt().mean()
        dim = centred.shape[1]
        rank = effective_rank(centred.double().cpu().numpy())
        return Spread(float(deviation) * math.sqrt(dim), rank, len(centred), dim)
