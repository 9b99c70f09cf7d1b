"""A heat map over its slice, as a picture."""

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

# Orange and azure, which colour-blind eyes tell apart.
FOR, AGAINST = np.array([255, 110, 0], np.float32), np.array([0, 140, 255], np.float32)
STRONGEST = 0.65  # opacity where the evidence is largest


def overlay(picture: NDArray[np.float32], cells: ArrayLike, full: float | None = None) -> NDArray[np.uint8]:
    """picture (rows, columns) in [0, 1] and the cells over it, of any shape -> (rows, columns, 3) RGB.

    Opacity grows with the evidence up to `full`, of either sign; without it up to the largest of this slice, and then
    colours of two slices do not compare.
    """
    rows, columns = picture.shape
    evidence = cv2.resize(np.asarray(cells, np.float32), (columns, rows), interpolation=cv2.INTER_LINEAR)[..., None]
    full = full or float(np.abs(evidence).max()) or 1.0
    opacity = STRONGEST * np.clip(np.abs(evidence) / full, 0, 1)
    grey = np.repeat(picture[..., None] * 255, 3, axis=2)
    blended = grey * (1 - opacity) + np.where(evidence > 0, FOR, AGAINST) * opacity
    return np.asarray(np.round(blended), np.uint8)
