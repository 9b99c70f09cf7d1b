"""Where a slice holds lung, fat, soft tissue and bone: places where a lesion of each kind may lie."""

from collections.abc import Iterator
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
GAS_HU = -950.0  # thinner than this is gas without tissue in it
GAS_SHARE = 0.4  # of an aerated region, from which on it is bowel gas, a bronchus or the air outside
FAT_HU = (-150.0, -40.0)
SOFT_HU = (-15.0, 180.0)
BONE_HU = 220.0

SMALLEST_LUNG_MM2 = 600.0
VESSEL_MM = 10.0  # vessels up to this wide belong to the lung around them
SKIN_MM = 5.0
HELD = (
    0.8  # of an aerated region that lies in the body's hull: it is a lung that the picture's edge or a thin wall opens
)
POOL_MM = 5.0  # what is brighter than bone this far from its outline, and even, is contrast agent in a heart or vessel
POOL_HU = 60.0  # standard deviation of what is even
POOL_BRIGHTEST_HU = 550.0  # mean; brighter still is bone or metal
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
    smooth: Floats = cv2.GaussianBlur(hu, (0, 0), SMOOTH_MM / COARSE_MM).astype(np.float32, copy=False)
    inside = (_changed(body, cv2.MORPH_ERODE, SKIN_MM) & ~_changed(lung, cv2.MORPH_DILATE, 2 * COARSE_MM)) > 0
    labels[inside & (smooth > FAT_HU[0]) & (smooth < FAT_HU[1])] = Tissue.FAT
    labels[inside & (smooth > SOFT_HU[0]) & (smooth < SOFT_HU[1])] = Tissue.SOFT
    # Marrow is as thin as soft tissue: what cortex encloses is bone.
    bright = (smooth > BONE_HU).astype(np.uint8)
    pools = _pools(smooth, bright)
    bone = _changed(bright & ~pools, cv2.MORPH_CLOSE, 4.0) & ~pools
    labels[inside & (bone > 0)] = Tissue.BONE
    labels[inside & (pools > 0)] = Tissue.SOFT
    labels[lung > 0] = Tissue.LUNG
    return labels


def _body(hu: Floats) -> Labels:
    """The largest dense region with all it encloses; the couch falls off where a gap parts it from the patient."""
    dense = _changed((hu > BODY_HU).astype(np.uint8), cv2.MORPH_OPEN, 4.0)
    wall = _largest(dense)
    hull = _hull(wall)
    for region in _aerated(hu, ~wall.astype(bool)):
        if hull[region > 0].mean() >= HELD:
            wall = _largest(wall | (_changed(region, cv2.MORPH_DILATE, 4.0) & hull))
    return wall


def _hull(mask: Labels) -> Labels:
    """The smallest convex region around all of it."""
    hull = np.zeros(mask.shape, np.uint8)
    if mask.any():
        outlines, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)  # far fewer than all pixels
        cv2.fillConvexPoly(hull, cv2.convexHull(np.concatenate(outlines)), 1)
    return hull


def _largest(mask: Labels) -> Labels:
    """The region that is largest with its holes, and they filled."""
    contours, _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = np.zeros(mask.shape, np.uint8)
    if contours:
        cv2.drawContours(filled, [max(contours, key=cv2.contourArea)], -1, 1, thickness=cv2.FILLED)
    return filled


def _lung(hu: Floats, body: Labels) -> Labels:
    """Aerated regions of the body that are neither small nor pure gas, with the vessels in them."""
    lung = np.zeros(hu.shape, np.uint8)
    for region in _aerated(hu, body > 0):
        lung |= region
    return _changed(lung, cv2.MORPH_CLOSE, VESSEL_MM / 2) & body


def _aerated(hu: Floats, within: NDArray[np.bool_]) -> Iterator[Labels]:
    """Each connected region of lung's density that is neither small nor pure gas."""
    count, regions, facts, _ = cv2.connectedComponentsWithStats(
        ((hu < AERATED_HU) & within).astype(np.uint8), connectivity=4
    )
    for region in range(1, count):
        if facts[region, cv2.CC_STAT_AREA] * COARSE_MM**2 >= SMALLEST_LUNG_MM2:
            pixels = regions == region
            if (hu[pixels] < GAS_HU).mean() < GAS_SHARE:
                yield pixels.astype(np.uint8)


def _pools(smooth: Floats, bright: Labels) -> Labels:
    """Contrast agent in heart and large vessels: as bright as bone, but wide and even."""
    count, regions = cv2.connectedComponents(_changed(bright, cv2.MORPH_ERODE, POOL_MM))
    pools = np.zeros(bright.shape, np.uint8)
    for region in range(1, count):
        pixels = regions == region
        if smooth[pixels].std() < POOL_HU and smooth[pixels].mean() < POOL_BRIGHTEST_HU:
            pools |= _changed(pixels.astype(np.uint8), cv2.MORPH_DILATE, 2 * POOL_MM) & bright
    return pools


def _changed(mask: Labels, how: int, radius_mm: float) -> Labels:
    """The mask grown, shrunk, opened or closed (one of cv2.MORPH_*) by a disc."""
    radius = max(1, round(radius_mm / COARSE_MM))
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1))
    return cv2.morphologyEx(mask, how, disc).astype(np.uint8, copy=False)
