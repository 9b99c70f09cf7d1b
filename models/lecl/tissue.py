"""Where a slice holds lung, fat, soft tissue and bone: places where a lesion of each kind may lie."""

from enum import IntEnum
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Labels = NDArray[np.uint8]

COARSE_MM = 1.4  # the map is made on pixels of about this size; finer ones cost time and say no more

BODY_HU = -300.0  # denser than this, and connected, is the patient
AERATED_HU = -550.0  # thinner than this, inside the body, is lung or gas
GAS_HU = -950.0  # a region whose mean is thinner than this is bowel gas or a bronchus
FAT_HU = (-150.0, -40.0)
SOFT_HU = (-15.0, 180.0)
BONE_HU = 220.0

SMALLEST_LUNG_MM2 = 600.0
VESSEL_MM = 10.0  # vessels up to this wide belong to the lung around them
SKIN_MM = 5.0
SMOOTH_MM = 1.6  # standard deviation; tissue is told by its mean, not by its noise


class Tissue(IntEnum):
    OUTSIDE = 0
    LUNG = 1
    FAT = 2
    SOFT = 3
    BONE = 4


def tissues(hu: NDArray[Any], spacing_mm: tuple[float, float]) -> Labels:
    """The tissue of each pixel of a slice, (rows, columns); a rough map by HU, good enough to place lesions."""
    rows, columns = hu.shape
    coarse = (max(1, round(rows * spacing_mm[0] / COARSE_MM)), max(1, round(columns * spacing_mm[1] / COARSE_MM)))
    small = cv2.resize(hu.astype(np.float32), coarse[::-1], interpolation=cv2.INTER_AREA)
    labels = _coarse_tissues(small.astype(np.float32, copy=False))
    return cv2.resize(labels, (columns, rows), interpolation=cv2.INTER_NEAREST).astype(np.uint8, copy=False)


def _coarse_tissues(hu: Floats) -> Labels:
    labels = np.full(hu.shape, Tissue.OUTSIDE, np.uint8)
    body = _body(hu)
    lung = _lung(hu, body)
    smooth = cv2.GaussianBlur(hu, (0, 0), SMOOTH_MM / COARSE_MM)
    inside = cv2.erode(body, _disc(SKIN_MM)).astype(bool) & ~cv2.dilate(lung, _disc(2 * COARSE_MM)).astype(bool)
    labels[inside & (smooth > FAT_HU[0]) & (smooth < FAT_HU[1])] = Tissue.FAT
    labels[inside & (smooth > SOFT_HU[0]) & (smooth < SOFT_HU[1])] = Tissue.SOFT
    # Marrow is as thin as soft tissue: what cortex encloses is bone.
    bone = cv2.morphologyEx((smooth > BONE_HU).astype(np.uint8), cv2.MORPH_CLOSE, _disc(4.0))
    labels[inside & bone.astype(bool)] = Tissue.BONE
    labels[lung.astype(bool)] = Tissue.LUNG
    return labels


def _body(hu: Floats) -> Labels:
    """The largest dense region with all it encloses; the couch falls off where a gap parts it from the patient."""
    dense = cv2.morphologyEx((hu > BODY_HU).astype(np.uint8), cv2.MORPH_OPEN, _disc(4.0))
    contours, _ = cv2.findContours(dense, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    body = np.zeros(hu.shape, np.uint8)
    if contours:
        cv2.drawContours(body, [max(contours, key=cv2.contourArea)], -1, 1, thickness=cv2.FILLED)
    return body


def _lung(hu: Floats, body: Labels) -> Labels:
    """Aerated regions of the body that are neither small nor pure gas, with the vessels in them."""
    aerated = ((hu < AERATED_HU) & (body > 0)).astype(np.uint8)
    count, regions, facts, _ = cv2.connectedComponentsWithStats(aerated, connectivity=4)
    lung = np.zeros(hu.shape, np.uint8)
    for region in range(1, count):
        if facts[region, cv2.CC_STAT_AREA] * COARSE_MM**2 < SMALLEST_LUNG_MM2:
            continue
        pixels = regions == region
        if hu[pixels].mean() > GAS_HU:
            lung[pixels] = 1
    closed = cv2.morphologyEx(lung, cv2.MORPH_CLOSE, _disc(VESSEL_MM / 2)).astype(np.uint8, copy=False)
    return closed & body


def _disc(radius_mm: float) -> Labels:
    radius = max(1, round(radius_mm / COARSE_MM))
    return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)).astype(np.uint8)
