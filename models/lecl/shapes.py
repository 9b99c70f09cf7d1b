"""Outlines of synthetic lesions: bumpy, stretched, lobed or spiculated bodies with an edge of some width."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

REACH = 1.9  # the farthest that a shape reaches from its centre, in radii
STRETCH = 1.6  # the longest axis over the shortest, at most
BUMPS = 6
SPICULES = (5, 14)


@dataclass(frozen=True)
class Shape:
    """A star-shaped body: its surface lies at one distance from the centre in every direction.

    That distance is the radius, times 1 plus the sum of waves over the sphere, plus spicules.
    """

    radius_mm: float
    edge_mm: float  # half the width over which the edge fades
    axes: Floats  # (3, 3): offsets in mm to the space where the body without bumps is the unit ball
    waves: Floats  # (bumps, 3): wave vector of each
    phases: Floats  # (bumps,)
    heights: Floats  # (bumps,) in radii
    spicules: Floats  # (spicules, 3): unit vectors
    lengths: Floats  # (spicules,) in radii
    sharpness: float  # of the spicules: 60 is some 10 degrees wide

    def share(self, offsets_mm: Floats, scale: float = 1.0) -> Floats:
        """(..., 3) offsets from the centre in mm -> (...) in [0, 1]: 1 inside, 0 outside; `scale` shrinks the body."""
        position = offsets_mm @ self.axes.T  # (..., 3) in radii
        distance = np.linalg.norm(position, axis=-1)  # (...)
        direction = position / np.maximum(distance, 1e-6)[..., None]
        surface = 1 + np.cos(direction @ self.waves.T + self.phases) @ self.heights  # (...)
        if len(self.spicules):
            surface += np.exp(self.sharpness * (direction @ self.spicules.T - 1)) @ self.lengths
        depth_mm = (scale * np.clip(surface, 0.3, REACH) - distance) * self.radius_mm
        fading: Floats = 1 / (1 + np.exp(np.clip(-2 * depth_mm / self.edge_mm, -30, 30)))
        return fading.astype(np.float32)


def random_shape(radius_mm: float, edge_mm: float, random: np.random.Generator, spiculated: bool = False) -> Shape:
    """A shape of this mean radius; `spiculated` gives it thin spikes."""
    rotation, _ = np.linalg.qr(random.normal(size=(3, 3)))
    stretch = STRETCH ** random.uniform(-0.5, 0.5, size=3)
    stretch /= np.prod(stretch) ** (1 / 3)  # the volume stays
    bumps = int(random.integers(0, BUMPS + 1))
    spikes = int(random.integers(*SPICULES)) if spiculated else 0
    towards = random.normal(size=(spikes, 3))
    return Shape(
        radius_mm=radius_mm,
        edge_mm=edge_mm,
        axes=(np.diag(1 / (stretch * radius_mm)) @ rotation).astype(np.float32),
        waves=(random.normal(size=(bumps, 3)) * random.uniform(1.5, 5)).astype(np.float32),
        phases=random.uniform(0, 2 * np.pi, size=bumps).astype(np.float32),
        heights=(random.uniform(0, 0.35, size=bumps) / max(1, bumps) ** 0.5).astype(np.float32),
        spicules=(towards / np.linalg.norm(towards, axis=1, keepdims=True)).astype(np.float32),
        lengths=random.uniform(0.2, 0.9, size=spikes).astype(np.float32),
        sharpness=random.uniform(40, 200),
    )
