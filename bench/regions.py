"""The same region of another patient: how far off the most similar slice lies."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.patients import Series
from bench.tissue import Tissue

APEX_MM2 = 1000.0  # lung area of a slice that belongs to the chest, 10 square centimetres
QUERY_STEP_MM = 5.0


@dataclass(frozen=True)
class Axis:
    """How far below the top of the lungs each slice lies."""

    depth_mm: NDArray[np.float64]  # (slices,); negative above the lungs
    in_lung: NDArray[np.bool_]  # (slices,)


def lung_axis(series: Series, tissue: Tissue) -> Axis | None:
    """Depth under the lung apex from HU alone, or None where the series does not show the apex.

    The apex is the highest slice with 10 square centimetres of lung; it is shown where the series goes on above it.
    """
    area = tissue.lung.sum(axis=(1, 2)) * series.spacing_mm[1] * series.spacing_mm[2]
    chest = np.flatnonzero(area >= APEX_MM2)
    if not len(chest) or chest[-1] == len(area) - 1:
        return None
    return Axis(series.z_mm[chest[-1]] - series.z_mm, area >= APEX_MM2)


def region_errors(
    query: NDArray[np.float32], query_axis: Axis, other: NDArray[np.float32], other_axis: Axis
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For lung slices about 5 mm apart: mm from the same depth of the other to its most similar slice; chance.

    `query` and `other` are (slices, features). Only depths that the other series has too are asked for. Chance is the
    mean over all slices of the other.
    """
    step = max(1, round(QUERY_STEP_MM / abs(float(np.median(np.diff(query_axis.depth_mm))))))
    asked = np.arange(0, len(query), step)
    depths = query_axis.depth_mm[asked]
    shared = query_axis.in_lung[asked] & (depths <= other_axis.depth_mm.max()) & (depths >= other_axis.depth_mm.min())
    asked, depths = asked[shared], depths[shared]
    nearest = (_unit(query[asked]) @ _unit(other).T).argmax(axis=1)
    apart = np.abs(other_axis.depth_mm[None] - depths[:, None])  # (asked, slices)
    return apart[np.arange(len(asked)), nearest], apart.mean(axis=1)


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
