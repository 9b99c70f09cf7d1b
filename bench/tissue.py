"""Where in a CT volume lung, soft tissue, fat and bone lie, found from HU alone; for measuring only."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

CORTEX_HU = 280.0  # denser than blood with contrast
COARSE = 4  # pixels: lungs are told from bowel gas on a grid coarser by this
LUNG_ML = 60.0  # a smaller pocket of air inside the body is bowel or airway
GAS_HU, GAS_SHARE = -950.0, 0.25  # bowel and airway hold gas of this HU and less; a lung hardly does


@dataclass(frozen=True)
class Tissue:
    """Masks of a volume, each (slices, rows, columns)."""

    body: Mask  # without couch and outer air
    lung: Mask  # with its vessels
    soft: Mask  # muscle and organs
    fat: Mask
    bone: Mask  # with its marrow

    def part(self, wanted: slice) -> "Tissue":
        """The same of some of the slices."""
        return Tissue(*(mask[wanted] for mask in (self.body, self.lung, self.soft, self.fat, self.bone)))


def find_tissue(hu: Floats, spacing_mm: tuple[float, float, float]) -> Tissue:
    """The tissues of (slices, rows, columns) HU; `spacing_mm` between slices, rows and columns."""
    body = np.stack([_body(each, spacing_mm[1]) for each in hu])
    smooth = np.stack([cv2.blur(each, (3, 3)) for each in hu])
    gas = np.stack([_dilated(_opened(each < GAS_HU, 3.0 / spacing_mm[1]), 4.0 / spacing_mm[1]) for each in smooth])
    lung = _lungs(hu, body, spacing_mm) & ~gas  # the trachea holds plain gas
    inner = np.stack([_eroded(each, 8.0 / spacing_mm[1]) for each in body])  # skin and its creases
    dense = (smooth > CORTEX_HU) & body
    pixels = 40.0 / (spacing_mm[1] * spacing_mm[2])  # 40 square millimetres
    bone = np.stack([_closed(_sizeable(each, pixels), 6.0 / spacing_mm[1]) for each in dense])
    bone &= body & ~lung
    soft = (smooth > 5) & (smooth < 160) & inner & ~lung & ~bone
    fat = (smooth > -135) & (smooth < -65) & inner & ~lung & ~bone
    soft = np.stack([_opened(each, 3.0 / spacing_mm[1]) for each in soft])
    return Tissue(body, lung, soft, fat, bone)


def _body(hu: Floats, pixel_mm: float) -> Mask:
    """The largest thing denser than air once thin ties (the couch, sheets) are cut, its holes filled."""
    solid = _opened(hu > -300, 6.0 / pixel_mm)
    labels, found = ndimage.label(solid)
    if found == 0:
        return np.zeros(hu.shape, np.bool_)
    largest = labels == 1 + np.argmax(np.bincount(labels.ravel())[1:])
    filled: Mask = ndimage.binary_fill_holes(largest)
    return filled


def _lungs(hu: Floats, body: Mask, spacing_mm: tuple[float, float, float]) -> Mask:
    """Large pockets of air inside the body that are not plain gas, closed over their vessels."""
    air = (hu < -400) & body
    coarse = air[:, ::COARSE, ::COARSE]
    labels, found = ndimage.label(coarse)
    if found == 0:
        return np.zeros(hu.shape, np.bool_)
    numbers = np.arange(1, found + 1)
    ml = np.bincount(labels.ravel(), minlength=found + 1)[1:] * np.prod(spacing_mm) * COARSE**2 / 1000
    gas = np.asarray(ndimage.mean(hu[:, ::COARSE, ::COARSE] < GAS_HU, labels, numbers))
    chosen = np.isin(labels, numbers[(ml >= LUNG_ML) & (gas <= GAS_SHARE)])
    grown = np.stack([_dilated(np.kron(each, np.ones((COARSE, COARSE), np.bool_)), COARSE) for each in chosen])
    grown = grown[:, : hu.shape[1], : hu.shape[2]]
    lung: Mask = np.stack([_closed(each, 6.0 / spacing_mm[1]) for each in air & grown])
    return lung & body


def _disc(radius: float) -> NDArray[np.uint8]:
    size = 2 * max(1, round(radius)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)), np.uint8)


def _opened(mask: Mask, radius: float) -> Mask:
    return np.asarray(cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, _disc(radius)), np.bool_)


def _closed(mask: Mask, radius: float) -> Mask:
    return np.asarray(cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_CLOSE, _disc(radius)), np.bool_)


def _eroded(mask: Mask, radius: float) -> Mask:
    return np.asarray(cv2.erode(mask.astype(np.uint8), _disc(radius)), np.bool_)


def _dilated(mask: Mask, radius: float) -> Mask:
    return np.asarray(cv2.dilate(mask.astype(np.uint8), _disc(radius)), np.bool_)


def _sizeable(mask: Mask, pixels: float) -> Mask:
    """Without components of fewer pixels: calcifications and noise."""
    labels, _ = ndimage.label(mask)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return np.asarray((counts >= pixels)[labels], np.bool_)
