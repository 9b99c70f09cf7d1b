"""Irregular solids, their edges and textures, for lesions that no training planted."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.transform import Rotation

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]
Random = np.random.Generator


def solid(points: Floats, random: Random) -> Mask:
    """Which of the points lie in a solid of a random shape; `points` (..., 3) as z, y, x in units of its radius."""
    turn = Rotation.random(rng=random).as_matrix().astype(np.float32)
    make = SHAPES[random.integers(len(SHAPES))]
    return make(points @ turn.T, random)


def _metaballs(points: Floats, random: Random) -> Mask:
    """Where the sum of Gaussian balls is above a level."""
    field = np.zeros(points.shape[:-1], np.float32)
    for _ in range(int(random.integers(4, 10))):
        centre, width = random.uniform(-0.55, 0.55, 3), random.uniform(0.25, 0.5)
        field += np.exp(-((points - centre) ** 2).sum(axis=-1) / width**2)
    return np.asarray(field > random.uniform(0.35, 0.6), np.bool_)


def _superellipsoid(points: Floats, random: Random) -> Mask:
    """Diamonds to rounded boxes: exponents below and above two."""
    radii = random.uniform(0.5, 1.0, 3)
    across, along = random.uniform(1.2, 5.0, 2)
    z, y, x = np.moveaxis(np.abs(points) / radii, -1, 0)
    return np.asarray((y**across + x**across) ** (along / across) + z**along <= 1.0, np.bool_)


def _extruded_star(points: Floats, random: Random) -> Mask:
    """A star-convex polygon, twisted and drifting along its axis, wide in the middle."""
    corners = int(random.integers(7, 15))
    radius = random.uniform(0.45, 1.0, corners)
    z, y, x = np.moveaxis(points, -1, 0)
    y, x = y - random.uniform(-0.2, 0.2) * z, x - random.uniform(-0.2, 0.2) * z
    angle = (np.arctan2(y, x) + random.uniform(-0.8, 0.8) * z) / (2 * np.pi) % 1.0
    outline = np.interp(angle * corners, np.arange(corners + 1), np.append(radius, radius[0]))
    power = random.uniform(1.5, 4.0)
    narrowing = np.clip(1 - np.abs(z / random.uniform(0.6, 1.0)) ** power, 0, 1) ** random.uniform(0.3, 0.7)
    return np.asarray(np.hypot(x, y) < outline * narrowing, np.bool_)


def _lobes(points: Floats, random: Random) -> Mask:
    """A core with lobes on its surface, and a bite out of it."""
    inside = (points**2).sum(axis=-1) < random.uniform(0.45, 0.65) ** 2
    for number in range(int(random.integers(3, 8))):
        direction = random.normal(size=3)
        centre = direction / np.linalg.norm(direction) * random.uniform(0.4, 0.6)
        near = ((points - centre) ** 2).sum(axis=-1) < random.uniform(0.25, 0.42) ** 2
        inside = inside & ~near if number == 0 else inside | near
    return np.asarray(inside, np.bool_)


SHAPES: tuple[Callable[[Floats, Random], Mask], ...] = (_metaballs, _superellipsoid, _extruded_star, _lobes)


def edged(depth_mm: Floats, radius_mm: float, random: Random) -> Floats:
    """Share of lesion at each depth under its surface (negative outside): sharp, ramped, tailing, stepped or ragged."""
    width = random.uniform(0.1, 0.3) * radius_mm
    match int(random.integers(5)):
        case 0:
            share = depth_mm / 1.0 + 0.5
        case 1:
            share = depth_mm / max(width, 1.0) + 0.5
        case 2:
            share = np.where(depth_mm > 0, 1.0, np.exp(np.minimum(depth_mm, 0) / max(0.6 * width, 0.4)))
        case 3:
            rim = random.uniform(0.45, 0.7)
            share = np.where(depth_mm > 1.2 * width, 1.0, rim) * np.clip(depth_mm / 0.8 + 0.5, 0, 1)
        case _:
            ragged = correlated(depth_mm.shape, random.uniform(1.5, 3.0), random) * 0.12 * radius_mm
            share = (depth_mm + ragged) / 1.2 + 0.5
    return np.clip(share, 0, 1).astype(np.float32)


def textured(shape: tuple[int, ...], random: Random) -> Floats:
    """A random texture of zero mean and unit spread: cloudy, patchy, banded or fine."""
    match int(random.integers(4)):
        case 0:
            return correlated(shape, random.uniform(2.0, 3.5), random)
        case 1:
            return _patches(shape, random)
        case 2:
            warp = correlated(shape, 3.0, random)
            axis = np.indices(shape).astype(np.float32)
            phase = np.tensordot(random.normal(size=len(shape)), axis, 1) / random.uniform(4, 10) * 2
            return _unit(np.sin(phase + 2 * warp))
        case _:
            return correlated(shape, random.uniform(0.8, 1.6), random)


def correlated(shape: tuple[int, ...], slope: float, random: Random) -> Floats:
    """Noise whose amplitude falls with spatial frequency to the power of -slope, of zero mean and unit spread."""
    frequencies = np.sqrt(sum(f**2 for f in np.meshgrid(*map(np.fft.fftfreq, shape), indexing="ij")))
    frequencies.flat[0] = np.inf  # no mean
    spectrum = np.fft.fftn(random.normal(size=shape)) * frequencies**-slope
    return _unit(np.fft.ifftn(spectrum).real)


def _patches(shape: tuple[int, ...], random: Random) -> Floats:
    """Cells around random points, each of its own value."""
    seeds = np.ones(shape, np.bool_)
    count = int(random.integers(8, 40))
    places = tuple(random.integers(0, size, count) for size in shape)
    seeds[places] = False
    nearest = ndimage.distance_transform_edt(seeds, return_distances=False, return_indices=True)
    values = np.zeros(shape)
    values[places] = random.normal(size=count)
    return _unit(ndimage.gaussian_filter(values[tuple(nearest)], 0.8))


def _unit(values: NDArray[np.floating]) -> Floats:
    centred = values - values.mean()
    return (centred / max(float(centred.std()), 1e-6)).astype(np.float32)
