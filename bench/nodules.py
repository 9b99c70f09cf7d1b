"""Real nodules transplanted into the lungs of other patients."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bench.patients import Nodule
from bench.shapes import Random
from bench.tissue import Tissue, find_tissue
from bench.unseen import Floats, Spacing, Unseen, finished

KIND = "lung_real"
SOFT_MM = 1.5  # the nodule's own rim of partial volume is taken along, fading over this
TRIES = 24


def transplant(
    volume: Floats, spacing_mm: Spacing, nodule: Nodule, random: Random, tissue: Tissue | None = None
) -> Unseen | None:
    """A copy of (slices, rows, columns) HU with the nodule in its lung, or None where no place was found.

    The nodule is turned about the z axis, flipped, brought to the volume's spacing, and blended over its rim.
    """
    tissue = tissue or find_tissue(volume, spacing_mm)
    if not tissue.lung.any():
        return None
    areas = tissue.lung.sum(axis=(1, 2))
    for _ in range(TRIES):
        hu, mask, share = _resampled(nodule, spacing_mm, random)
        k = int(random.choice(len(areas), p=areas / areas.sum()))
        row, column = np.unravel_index(np.flatnonzero(tissue.lung[k])[random.integers(areas[k])], tissue.lung.shape[1:])
        corner = [at - size // 2 for at, size in zip((k, int(row), int(column)), mask.shape, strict=True)]
        if any(at < 0 or at + size > whole for at, size, whole in zip(corner, mask.shape, volume.shape, strict=True)):
            continue
        box = tuple(slice(at, at + size) for at, size in zip(corner, mask.shape, strict=True))
        if (tissue.lung[box] & mask).sum() < 0.9 * mask.sum():
            continue
        painted = volume[box] + share * (hu - volume[box])
        return finished(volume, (box[0], box[1], box[2]), painted, mask, tissue.lung, KIND, spacing_mm)
    return None


def _resampled(nodule: Nodule, spacing_mm: Spacing, random: Random) -> tuple[Floats, NDArray[np.bool_], Floats]:
    """HU, mask and share of the nodule on the other patient's grid, turned and flipped at random."""
    inside, outside = (
        ndimage.distance_transform_edt(each, sampling=nodule.spacing_mm) for each in (nodule.mask, ~nodule.mask)
    )
    share = np.clip(1 + (np.minimum(inside, SOFT_MM) - outside) / SOFT_MM, 0, 1)
    angle, flips = random.uniform(0, 2 * np.pi), random.choice([-1.0, 1.0], 3)
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]]) * flips
    thin = np.array([nodule.spacing_mm[0], *spacing_mm[1:]])  # slices are averaged afterwards
    reach = np.array(nodule.mask.shape) * nodule.spacing_mm / 2 + 2.0
    thick = max(1, round(spacing_mm[0] / thin[0]))
    half = np.ceil([reach[0] / thin[0], max(reach[1:]) / thin[1], max(reach[1:]) / thin[2]]).astype(int)
    size = 2 * half + 1
    size[0] = -(-size[0] // thick) * thick
    matrix = np.diag(1 / np.array(nodule.spacing_mm)) @ turn @ np.diag(thin)
    offset = (np.array(nodule.mask.shape) - 1) / 2 - matrix @ ((size - 1) / 2)

    def moved(values: NDArray[np.floating], beyond: float) -> Floats:
        fine = ndimage.affine_transform(values, matrix, offset, tuple(size), order=1, cval=beyond)
        averaged: Floats = fine.reshape(-1, thick, *fine.shape[1:]).mean(axis=1).astype(np.float32)
        return averaged

    weight = moved(share, 0.0)
    # The nodule's mean where it is, so that its old lung does not come along with a thick slice.
    hu = moved(nodule.hu * share, 0.0) / np.maximum(weight, 1e-3)
    keep = np.flatnonzero((weight > 0).any(axis=(1, 2)))
    part = slice(keep[0], keep[-1] + 1)
    return hu[part], moved(nodule.mask.astype(np.float32), 0.0)[part] > 0.5, weight[part]
