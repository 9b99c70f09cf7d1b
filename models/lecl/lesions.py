"""Synthetic lesions planted in HU into real slices, each with a decoy: an edit of the same size that is no lesion."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.lecl.shapes import REACH, Shape, random_shape
from models.lecl.tissue import Labels, Tissue, tissues

Floats = NDArray[np.float32]
Range = tuple[float, float]
Box = tuple[slice, slice, slice]

DIAMETER_MM = (4.0, 40.0)  # drawn on a logarithmic scale
TRIES = 20  # of a place, before a plant is given up
DRAWN = 4096  # pixels among which those of the tissue are tried
ROOM = {Tissue.LUNG: 0.6, Tissue.FAT: 0.5, Tissue.SOFT: 0.75, Tissue.BONE: 0.5}  # share of a place that is its tissue
WEIGHTS = {Tissue.LUNG: 0.4, Tissue.SOFT: 0.36, Tissue.BONE: 0.1, Tissue.FAT: 0.14}  # of where to plant
ALIKE = {Tissue.LUNG: 50.0, Tissue.FAT: 15.0, Tissue.SOFT: 12.0, Tissue.BONE: 80.0}  # HU between a decoy's two means


@dataclass(frozen=True)
class Kind:
    """How dense a kind of lesion is and how its outline looks; densities in HU.

    A `relative` density is added to what was there, so vessels and noise show through; another replaces it.
    """

    name: str
    tissue: Tissue
    density: Range
    relative: bool = False
    core: Range | None = None  # of the inner part
    core_relative: bool = False
    core_share: Range = (0.3, 0.75)  # of the radius
    edge_mm: Range = (0.3, 1.6)  # half the width over which it fades
    spiculated: bool = False
    calcium: bool = False  # specks of 200 to 800 HU in it
    largest_mm: float = DIAMETER_MM[1]


FAINT = (0.4, 3.0)  # mm

KINDS = (
    Kind("solid nodule", Tissue.LUNG, (-40, 120)),
    Kind("spiculated nodule", Tissue.LUNG, (-40, 100), spiculated=True),
    Kind("part-solid nodule", Tissue.LUNG, (130, 500), relative=True, core=(-100, 80), edge_mm=FAINT),
    Kind("ground-glass nodule", Tissue.LUNG, (120, 550), relative=True, edge_mm=FAINT),
    Kind("calcified nodule", Tissue.LUNG, (20, 150), calcium=True, largest_mm=25),
    Kind("hypodense lesion", Tissue.SOFT, (-130, -25), relative=True, edge_mm=FAINT),
    Kind("hyperdense lesion", Tissue.SOFT, (25, 130), relative=True, edge_mm=FAINT),
    Kind(
        "rim-enhancing lesion",
        Tissue.SOFT,
        (30, 120),
        relative=True,
        core=(-100, -15),
        core_relative=True,
        core_share=(0.5, 0.85),
    ),
    Kind(
        "target lesion",
        Tissue.SOFT,
        (-100, -25),
        relative=True,
        core=(15, 100),
        core_relative=True,
        core_share=(0.3, 0.7),
    ),
    Kind("calcified lesion", Tissue.SOFT, (-70, 70), relative=True, calcium=True),
    Kind("cyst", Tissue.SOFT, (-30, 15), edge_mm=(0.3, 1.0)),
    Kind("lytic lesion", Tissue.BONE, (0, 110)),
    Kind("sclerotic lesion", Tissue.BONE, (250, 700), relative=True, largest_mm=30),
    Kind("node", Tissue.FAT, (0, 130), largest_mm=30),
    Kind("necrotic node", Tissue.FAT, (50, 150), core=(0, 40), largest_mm=35),
)


@dataclass(frozen=True)
class Planted:
    """A copy of the volume with an edit in it; arrays are (slices, rows, columns)."""

    hu: Floats
    mask: Floats  # in [0, 1]: how much of each pixel is edited
    kind: str
    diameter_mm: float
    contrast_hu: float  # mean change of HU where the mask is above a half


@dataclass(frozen=True)
class Place:
    """Where an edit goes: a slice, a pixel and a size at which the tissue around it has room."""

    centre: tuple[float, int, int]  # slice (between slices as well), row, column
    tissue: Tissue
    diameter_mm: float
    labels: Labels  # (rows, columns) of that slice


def plant(
    hu: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    random: np.random.Generator,
    diameter_mm: Range = DIAMETER_MM,
    labels: Labels | None = None,
) -> Planted | None:
    """Plant one lesion into a volume, (slices, rows, columns) of HU; None where no tissue has room for it.

    `spacing_mm` is between slices, rows and columns. `labels`, the tissue map of a volume of one slice, spares
    computing it. The same state of the generator gives the same lesion.
    """
    place = _place(hu, spacing_mm, random, diameter_mm, labels)
    if place is None:
        return None
    kind, diameter, shape = _drawn(place, random)
    box, offsets = _grid(place, diameter, hu.shape, spacing_mm)
    mask = _within_lung(shape.share(offsets), box, place)
    density = _density(kind, hu[box].astype(np.float32), shape, offsets, spacing_mm, random)
    return _blended(hu, box, mask, density, kind.name, diameter)


def decoy(
    hu: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    random: np.random.Generator,
    diameter_mm: Range = DIAMETER_MM,
    labels: Labels | None = None,
) -> Planted | None:
    """The same edit without a lesion: normal tissue of the same slices, moved here behind a lesion's outline and edge.

    None where the slices hold no second place of the same tissue and mean.
    """
    place = _place(hu, spacing_mm, random, diameter_mm, labels)
    if place is None:
        return None
    _kind, diameter, shape = _drawn(place, random)
    box, offsets = _grid(place, diameter, hu.shape, spacing_mm)
    mask = _within_lung(shape.share(offsets), box, place)
    moved = _elsewhere(hu, box, mask, place, random)
    return None if moved is None else _blended(hu, box, mask, moved, "decoy", diameter)


def _drawn(place: Place, random: np.random.Generator) -> tuple[Kind, float, Shape]:
    """A kind of lesion that lies in such a place, its diameter in mm and its outline."""
    kinds = [each for each in KINDS if each.tissue == place.tissue]
    kind = kinds[random.integers(len(kinds))]
    diameter = min(place.diameter_mm, kind.largest_mm)
    return kind, diameter, random_shape(diameter / 2, random.uniform(*kind.edge_mm), random, kind.spiculated)


def _place(
    hu: NDArray[Any],
    spacing_mm: tuple[float, float, float],
    random: np.random.Generator,
    diameter_mm: Range,
    labels: Labels | None,
) -> Place | None:
    number = int(random.integers(len(hu)))
    if labels is None:
        labels = tissues(hu[number], spacing_mm[1:])
    diameter = float(np.exp(random.uniform(*np.log(diameter_mm))))
    area_mm2 = np.bincount(labels.ravel(), minlength=len(Tissue)) * spacing_mm[1] * spacing_mm[2]
    weights = np.array([WEIGHTS.get(tissue, 0.0) * (area_mm2[tissue] > 200) for tissue in Tissue])
    if not weights.any():
        return None
    tissue = Tissue(random.choice(len(Tissue), p=weights / weights.sum()))
    for row, column in _pixels(labels, tissue, random):
        reach = (round(diameter * 0.4 / spacing_mm[1]), round(diameter * 0.4 / spacing_mm[2]))
        around = labels[max(0, row - reach[0]) : row + reach[0] + 1, max(0, column - reach[1]) : column + reach[1] + 1]
        if (around == tissue).mean() >= ROOM[tissue]:
            away_mm = random.uniform(-0.5, 0.5) * (spacing_mm[0] if len(hu) > 1 else 0.55 * diameter)
            return Place((number + away_mm / spacing_mm[0], row, column), tissue, diameter, labels)
        diameter = max(diameter_mm[0], 0.9 * diameter)
    return None


def _pixels(labels: Labels, tissue: Tissue, random: np.random.Generator) -> list[tuple[int, int]]:
    """Some pixels of a tissue, at most TRIES; drawn blindly, for listing all of them takes longer than planting."""
    drawn = random.integers(labels.size, size=DRAWN)
    hits = drawn[labels.ravel()[drawn] == tissue][:TRIES]
    return [(int(at) // labels.shape[1], int(at) % labels.shape[1]) for at in hits]


def _grid(
    place: Place, diameter_mm: float, shape: tuple[int, ...], spacing_mm: tuple[float, float, float]
) -> tuple[Box, Floats]:
    """What of the volume a lesion here can reach, and its offsets in mm, (slices, rows, columns, 3)."""
    reach_mm = diameter_mm / 2 * REACH + 3
    ranges = [
        np.arange(max(0, int(np.ceil(at - reach_mm / step))), min(length, int(at + reach_mm / step) + 1))
        for at, length, step in zip(place.centre, shape, spacing_mm, strict=True)
    ]
    axes = [(each - at) * step for each, at, step in zip(ranges, place.centre, spacing_mm, strict=True)]
    offsets = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).astype(np.float32)
    z, y, x = (slice(int(each[0]), int(each[-1]) + 1) for each in ranges)
    return (z, y, x), offsets


def _within_lung(mask: Floats, box: Box, place: Place) -> Floats:
    """A lesion of the lung ends at the pleura."""
    if place.tissue != Tissue.LUNG:
        return mask
    lung = cv2.GaussianBlur((place.labels[box[1:]] == Tissue.LUNG).astype(np.float32), (0, 0), 0.8)
    within: Floats = mask * lung
    return within


def _density(
    kind: Kind,
    here: Floats,
    shape: Shape,
    offsets: Floats,
    spacing_mm: tuple[float, float, float],
    random: np.random.Generator,
) -> Floats:
    """HU of the lesion on its grid, (slices, rows, columns), with texture as noisy as the surroundings."""
    noise = _noise(here, random)
    uneven = _blobs(here.shape, random.uniform(1.0, 4.0), spacing_mm, random) * random.uniform(0, 15)
    level = random.uniform(*kind.density)
    hu = (here if kind.relative else noise) + level + uneven
    if kind.core:
        core_level = random.uniform(*kind.core)
        core = (here if kind.core_relative else noise) + core_level + uneven
        share = shape.share(offsets, scale=random.uniform(*kind.core_share))
        hu = hu + share * (core - hu)
    if kind.calcium:
        blobs = _blobs(here.shape, random.uniform(0.7, 2.0), spacing_mm, random)
        specks = np.clip((blobs - random.uniform(0.8, 2.0)) * 2, 0, 1)
        hu = hu + specks * random.uniform(200, 800)
    return hu


def _noise(here: Floats, random: np.random.Generator) -> Floats:
    """Noise with the standard deviation of the surroundings' own, correlated over about a pixel as CT's is."""
    residual = here - np.stack([cv2.GaussianBlur(each, (0, 0), 1.5) for each in here])
    deviation = float(np.clip(np.median(np.abs(residual)) / 0.6745, 3, 40))  # of a normal distribution, robustly
    noise = random.normal(size=here.shape).astype(np.float32)
    width = random.uniform(0.4, 0.9)  # pixels
    smooth = np.stack([cv2.GaussianBlur(each, (0, 0), width) for each in noise])
    return smooth.astype(np.float32) * np.float32(1.25 * deviation / max(float(smooth.std()), 1e-6))


def _blobs(
    shape: tuple[int, ...], width_mm: float, spacing_mm: tuple[float, float, float], random: np.random.Generator
) -> Floats:
    """Smooth noise of standard deviation 1, correlated over `width_mm` in the plane."""
    noise = random.normal(size=shape).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(each, (0, 0), width_mm / spacing_mm[1]) for each in noise])
    return smooth.astype(np.float32) / np.float32(max(float(smooth.std()), 1e-6))


def _elsewhere(hu: NDArray[Any], box: Box, mask: Floats, place: Place, random: np.random.Generator) -> Floats | None:
    """HU of another place of the same tissue whose mean under the mask is nearly the same, or None."""
    z, y, x = box
    inside = mask > 0.5
    if not inside.any():
        return None
    here = float(hu[box][inside].mean())
    for row, column in _pixels(place.labels, place.tissue, random):
        down, right = row - place.centre[1], column - place.centre[2]
        top, left = y.start + down, x.start + right
        bottom, far = y.stop + down, x.stop + right
        if top < 0 or left < 0 or bottom > hu.shape[1] or far > hu.shape[2]:
            continue
        there = hu[z, top:bottom, left:far].astype(np.float32)
        same = (place.labels[top:bottom, left:far] == place.tissue)[inside.any(axis=0)].mean()
        if same >= ROOM[place.tissue] and abs(float(there[inside].mean()) - here) < ALIKE[place.tissue]:
            return there
    return None


def _blended(
    hu: NDArray[Any], box: Box, mask: Floats, density: Floats, kind: str, diameter_mm: float
) -> Planted | None:
    inside = mask > 0.5
    if not inside.any():
        return None  # it lies between the slices
    edited = hu.astype(np.float32)
    before = edited[box]
    after = before + mask * (density - before)
    contrast = float((after - before)[inside].mean())
    edited[box] = after
    whole = np.zeros(hu.shape, np.float32)
    whole[box] = mask
    return Planted(edited, whole, kind, diameter_mm, contrast)
