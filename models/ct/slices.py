"""A slice file as encoder input: every window of it, resized, in [0, 1]."""

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from models.ct.decode import decoded_hu
from models.ct.errors import UndecodableSlice
from models.ct.screening import Reason, SetAside, screened_dataset
from models.ct.series import CTSlice, slice_of
from models.ct.windows import Window, apply_window


def encoder_input(
    hu: NDArray[np.float32], windows: tuple[Window, ...], size: int, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The slice at each window, (windows, size, size) in [0, 1], resized by area averaging.

    Windowed before resizing, as the paper's code does: clipping and averaging do not commute.
    """
    if out is None:
        out = np.empty((len(windows), size, size), np.float32)
    for picture, window in zip(out, windows, strict=True):
        picture[:] = cv2.resize(apply_window(hu, window), (size, size), interpolation=cv2.INTER_AREA)
    return out


def prepare_slice(path: Path, out: NDArray[np.float32], windows: tuple[Window, ...], size: int) -> CTSlice | SetAside:
    """Write one file's encoder input to `out`, (windows, size, size); answers where the slice lies.

    A file that is no usable slice, or does not decode, answers why; `out` then holds anything.
    """
    dataset = screened_dataset(path)
    if isinstance(dataset, SetAside):
        return dataset
    try:
        encoder_input(decoded_hu(dataset), windows, size, out)
    except UndecodableSlice as error:
        return SetAside(Reason.UNDECODABLE, str(error))
    return slice_of(path, dataset)
