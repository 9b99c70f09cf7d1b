"""What a lesion of the unseen recipe does to HU, by kind."""

import numpy as np
from scipy import ndimage

from bench.shapes import Floats, Mask, Random, correlated, textured


def painted(kind: str, hu: Floats, tissue: Mask, share: Floats, random: Random) -> Floats:
    """The box `hu` (slices, rows, columns) with the lesion in it; `share` of each voxel is lesion, in [0, 1]."""
    paint = {"lung": _in_lung, "node": _node, "bone": _in_bone, "soft": _in_organ}[kind.partition("_")[0]]
    return paint(kind, hu, tissue, share, random).astype(np.float32)


def _in_lung(kind: str, hu: Floats, tissue: Mask, share: Floats, random: Random) -> Floats:
    noise = _noise(hu, tissue, random)
    texture = textured(hu.shape, random) * random.uniform(3, 20)
    match kind:
        case "lung_ground_glass":  # a veil: vessels stay, and nothing becomes denser than tissue
            return hu + share * (random.uniform(140, 380) + 3 * texture) * np.clip((60 - hu) / 500, 0, 1)
        case "lung_part_solid":
            target = random.uniform(-330, -180) + 60 * np.clip(textured(hu.shape, random), -1.5, 2.5) + noise
            return hu + share * (np.maximum(target, hu) - hu)
        case "lung_cavitary":
            wall = int(random.integers(2, 5))  # pixels
            hollow = ndimage.binary_erosion(share > 0.8, iterations=wall, axes=(1, 2)).astype(np.float32)
            emptied = share * ndimage.gaussian_filter(hollow, (0, 1, 1)) * random.uniform(600, 900)
            return hu + share * (random.uniform(-40, 60) + texture + noise - hu) - emptied
        case _:
            return hu + share * (random.uniform(-10, 80) + texture + noise - hu)


def _node(kind: str, hu: Floats, tissue: Mask, share: Floats, random: Random) -> Floats:
    target = random.uniform(-10, 80) + textured(hu.shape, random) * random.uniform(3, 20) + _noise(hu, tissue, random)
    return hu + share * (target - hu)


def _in_bone(kind: str, hu: Floats, tissue: Mask, share: Floats, random: Random) -> Floats:
    texture = textured(hu.shape, random) * random.uniform(3, 20)
    if kind == "bone_sclerotic":
        return hu + share * (random.uniform(250, 700) + 6 * texture)
    return hu + share * (random.uniform(10, 90) + texture + _noise(hu, tissue, random) - hu)


def _in_organ(kind: str, hu: Floats, tissue: Mask, share: Floats, random: Random) -> Floats:
    """Darker or brighter than the organ by 30 to 110 HU; some of the organ's own pattern is lost."""
    contrast = random.uniform(30, 110)
    texture = textured(hu.shape, random) * random.uniform(3, 20)
    lost = random.uniform(0.2, 0.9) * (float(np.median(hu[tissue])) - ndimage.gaussian_filter(hu, (0, 1.5, 1.5)))
    if kind == "soft_necrotic":
        blotches = ndimage.gaussian_filter(textured(hu.shape, random), (0, 1.5, 1.5))
        pools = np.clip(0.6 + 0.7 * blotches, 0, 1)  # dark, in tissue that takes up contrast
        rim = random.uniform(0, 60) * np.clip(4 * share * (1 - share), 0, 1)
        return hu + share * (lost - pools * 1.2 * contrast + (1 - pools) * random.uniform(0, 40) + rim + texture)
    return hu + share * (lost + (contrast if kind == "soft_hyper" else -contrast) + texture)


def _noise(hu: Floats, tissue: Mask, random: Random) -> Floats:
    """Fine noise of the scanner's strength: what a smoothing takes away, by its median, which ignores vessels."""
    residual = hu - ndimage.gaussian_filter(hu, (0, 1.0, 1.0))
    spread = float(np.clip(1.48 * np.median(np.abs(residual[tissue])), 3, 30))  # HU
    return correlated(hu.shape, 0.4, random) * spread
