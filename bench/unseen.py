"""Lesions of a recipe that no training uses, planted into real CT to measure encoders."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from bench.painting import painted
from bench.shapes import Random, edged, solid
from bench.tissue import Tissue, find_tissue

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Spacing = tuple[float, float, float]  # mm between slices, rows, columns

RECIPE = 1  # goes up when the recipe changes: figures of two recipes are not compared
DIAMETER_MM = (4.0, 40.0)
FULLNESS = 1.25  # shapes are narrower than the ball that they are drawn in
TRIES = 24
MARGIN_MM = 10.0  # around the lesion, for its edge and its surroundings
VISIBLE_SHARE = 0.25  # of the largest cross-section: a smaller cap is not counted as a slice of the lesion
VISIBLE_HU = 15.0  # mean change over the cross-section
CONSPICUOUS_MM, CONSPICUOUS_HU = 10.0, 60.0

KINDS = {  # tissue it grows in, and how often it is drawn
    "lung_solid": ("lung", 0.22),
    "lung_part_solid": ("lung", 0.08),
    "lung_ground_glass": ("lung", 0.08),
    "lung_cavitary": ("lung", 0.06),
    "soft_hypo": ("soft", 0.16),
    "soft_hyper": ("soft", 0.12),
    "soft_necrotic": ("soft", 0.10),
    "bone_lytic": ("bone", 0.04),
    "bone_sclerotic": ("bone", 0.04),
    "node": ("fat", 0.10),
}


@dataclass(frozen=True)
class Unseen:
    """A volume with one lesion, and what is known of it."""

    hu: Floats  # (slices, rows, columns): a copy
    slices: tuple[int, ...]  # where its cross-section can be seen
    changed: tuple[int, ...]  # where any pixel changed; faint caps included
    mask: Mask  # (slices, rows, columns)
    centre: tuple[float, float, float]  # slice, row, column
    diameter_mm: float  # its longest extent in one slice
    kind: str
    contrast_hu: float  # mean of the lesion minus mean of the same tissue around it
    conspicuous: bool  # 10 mm or more, and solid in lung, or 60 HU or more from its surroundings elsewhere


@dataclass(frozen=True)
class _Site:
    """The box of a volume that a lesion is planted into."""

    box: tuple[slice, slice, slice]
    centre: tuple[float, float, float]  # slice, row, column of the volume
    hu: Floats  # of the box
    tissue: Mask  # of the box: what the lesion grows in


def plant_unseen(
    volume_hu: Floats,
    spacing_mm: Spacing,
    random: Random,
    diameter_mm: tuple[float, float] = DIAMETER_MM,
    tissue: Tissue | None = None,
) -> Unseen | None:
    """A copy of (slices, rows, columns) HU with one lesion in fitting tissue, or None where no place was found.

    The same volume and generator state give the same lesion. `diameter_mm` bounds the nominal size; the answer's is
    measured. `tissue` saves finding it again.
    """
    tissue = tissue or find_tissue(volume_hu, spacing_mm)
    weights = np.array([often if getattr(tissue, where).any() else 0.0 for where, often in KINDS.values()])
    if not weights.any():
        return None
    for _ in range(TRIES):
        kind = str(random.choice(list(KINDS), p=weights / weights.sum()))
        radius_mm = FULLNESS * float(np.exp(random.uniform(*np.log(diameter_mm)))) / 2
        grown = getattr(tissue, KINDS[kind][0])
        site = _site(volume_hu, grown, spacing_mm, radius_mm, random)
        share = _share(site, spacing_mm, radius_mm, random)
        fitting = share * ndimage.gaussian_filter(site.tissue.astype(np.float32), (0, 0.7, 0.7))
        if fitting.sum() < 0.75 * share.sum() or not (fitting > 0.5).any():
            continue
        planted = finished(
            volume_hu,
            site.box,
            painted(kind, site.hu, site.tissue, fitting, random),
            fitting > 0.5,
            grown,
            kind,
            spacing_mm,
        )
        if planted and DIAMETER_MM[0] <= planted.diameter_mm <= DIAMETER_MM[1]:
            return replace(planted, centre=site.centre)
    return None


def _site(hu: Floats, tissue: Mask, spacing_mm: Spacing, radius_mm: float, random: Random) -> _Site:
    """A box around a random voxel of the tissue, every slice that has some weighing the same as its area."""
    k = int(random.choice(len(tissue), p=(areas := tissue.sum(axis=(1, 2))) / areas.sum()))
    place = random.integers(areas[k])
    row, column = np.unravel_index(np.flatnonzero(tissue[k])[place], tissue.shape[1:])
    beyond = random.uniform(0, 0.7) * radius_mm / spacing_mm[0]  # at an end of the stack a lesion may be cut through
    z = k - beyond if k == 0 else k + beyond if k == len(tissue) - 1 else k + random.uniform(-0.5, 0.5)
    centre = (float(z), float(row), float(column))
    box = _box(centre, radius_mm + MARGIN_MM, spacing_mm, hu.shape)
    return _Site(box, centre, hu[box], tissue[box])


def _box(
    centre: tuple[float, ...], reach_mm: float, spacing_mm: Spacing, shape: tuple[int, ...]
) -> tuple[slice, slice, slice]:
    low = [max(0, int(np.floor(at - reach_mm / step))) for at, step in zip(centre, spacing_mm, strict=True)]
    high = [
        min(size, int(np.ceil(at + reach_mm / step)) + 1)
        for at, step, size in zip(centre, spacing_mm, shape, strict=True)
    ]
    return (slice(low[0], high[0]), slice(low[1], high[1]), slice(low[2], high[2]))


def _share(site: _Site, spacing_mm: Spacing, radius_mm: float, random: Random) -> Floats:
    """How much of each voxel is lesion, averaged over the slice's thickness."""
    steps = max(1, round(spacing_mm[0] / 1.0))  # sub-slices of about 1 mm
    fine = np.arange(site.box[0].start - 0.5 + 0.5 / steps, site.box[0].stop - 0.5, 1 / steps)
    axes = [fine, *(np.arange(side.start, side.stop) for side in site.box[1:])]
    millimetres = [(axis - at) * step for axis, at, step in zip(axes, site.centre, spacing_mm, strict=True)]
    points = np.stack(np.meshgrid(*millimetres, indexing="ij"), axis=-1).astype(np.float32)
    inside = solid(points / radius_mm, random)
    sampling = (spacing_mm[0] / steps, *spacing_mm[1:])
    outward = (
        ndimage.distance_transform_edt(~inside, sampling=sampling) if inside.any() else np.full(inside.shape, 99.0)
    )
    depth_mm = (ndimage.distance_transform_edt(inside, sampling=sampling) - outward).astype(np.float32)
    share = edged(depth_mm, radius_mm, random)
    share[depth_mm < -MARGIN_MM / 2] = 0
    thick: Floats = share.reshape(-1, steps, *share.shape[1:]).mean(axis=1)
    return thick


def finished(
    volume_hu: Floats,
    box: tuple[slice, slice, slice],
    painted: Floats,
    mask: Mask,
    tissue: Mask,
    kind: str,
    spacing_mm: Spacing,
) -> Unseen | None:
    """The volume with the painted box, measured; None where nothing of it can be seen."""
    change = painted - volume_hu[box]
    change[np.abs(change) < 0.5] = 0  # less than a stored step
    area = mask.sum(axis=(1, 2))
    seen = [
        k
        for k in range(len(mask))
        if area[k] >= max(VISIBLE_SHARE * area.max(), 4) and np.abs(change[k][mask[k]]).mean() >= VISIBLE_HU
    ]
    if not seen:
        return None
    hu = volume_hu.copy()
    hu[box] += change
    whole = np.zeros(hu.shape, np.bool_)
    whole[box] = mask
    centre = ndimage.center_of_mass(mask)
    reach = round(4 / spacing_mm[1])
    ring = (
        ndimage.binary_dilation(mask, iterations=reach, axes=(1, 2))
        & ~ndimage.binary_dilation(mask, axes=(1, 2), iterations=2)
        & tissue[box]
    )
    around = volume_hu[box][ring] if ring.any() else volume_hu[box][tissue[box]]
    contrast = float(hu[box][mask].mean() - np.mean(around)) if around.size else 0.0
    diameter = max(_diameter_mm(mask[k], spacing_mm) for k in seen)
    outside_lung = not kind.startswith("lung")
    striking = abs(contrast) >= CONSPICUOUS_HU if outside_lung else kind in ("lung_solid", "lung_real")
    return Unseen(
        hu=hu,
        slices=tuple(k + box[0].start for k in seen),
        changed=tuple(int(k) + box[0].start for k in np.flatnonzero(change.any(axis=(1, 2)))),
        mask=whole,
        centre=(centre[0] + box[0].start, centre[1] + box[1].start, centre[2] + box[2].start),
        diameter_mm=diameter,
        kind=kind,
        contrast_hu=contrast,
        conspicuous=bool(diameter >= CONSPICUOUS_MM and striking),
    )


def _diameter_mm(mask: Mask, spacing_mm: Spacing) -> float:
    """The longest straight line between two pixels of a cross-section, each counted with its own width."""
    edge = mask & ~ndimage.binary_erosion(mask)
    points = np.argwhere(edge) * np.array(spacing_mm[1:])
    apart = np.sqrt(((points[:, None] - points[None]) ** 2).sum(axis=-1))
    return float(apart.max() + np.mean(spacing_mm[1:]))
