"""Named Hounsfield windows: which range of HU an encoder sees."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Window:
    name: str
    low: float  # HU, mapped to 0
    high: float  # HU, mapped to 1


# The two windows of CLEAR (Ligero, Lenz et al., MICCAI 2025).
ABDOMEN = Window("abdomen", low=-175.0, high=275.0)
LUNG = Window("lung", low=-1500.0, high=500.0)

# What the volume encoders see (Merlin, CT-CLIP).
WIDE = Window("wide", low=-1000.0, high=1000.0)

WINDOWS = {window.name: window for window in (ABDOMEN, LUNG, WIDE)}


def apply_window(hu: NDArray[np.float32], window: Window) -> NDArray[np.float32]:
    """Map HU linearly onto [0, 1] and clip outside it (DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT)."""
    scaled = hu - np.float32(window.low)
    scaled *= np.float32(1.0 / (window.high - window.low))
    return np.clip(scaled, 0.0, 1.0, out=scaled)
