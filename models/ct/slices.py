"""A slice as encoder input: every window of it, resized, in [0, 1]."""

from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from models.ct.decode import decoded_hu
from models.ct.errors import UndecodableSlice
from models.ct.reasons import Reason
from models.ct.screening import Frames, SetAside, screened_dataset, screened_frame
from models.ct.series import CTSlice, slice_of
from models.ct.windows import Window, apply_window

FrameOf = tuple[Path, int]  # a multi-frame file and the frame's number, from 1


def encoder_input(
    hu: NDArray[np.float32], windows: tuple[Window, ...], size: int, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The slice at each window, (windows, size, size) in [0, 1], resized by area averaging.

    Windowed before resizing, as the paper's code does: clipping and averaging do not commute. A slice
    that is smaller than `size` is enlarged linearly.
    """
    if out is None:
        out = np.empty((len(windows), size, size), np.float32)
    for picture, window in zip(out, windows, strict=True):
        windowed = apply_window(hu, window)
        if min(hu.shape) < size:
            cv2.resize(windowed, (size, size), dst=picture, interpolation=cv2.INTER_LINEAR)
        else:
            # As cv2.INTER_AREA to the last digit, in a quarter of its time: each side is a sparse product.
            low = _area_average(hu.shape[0], size) @ windowed  # (size, columns)
            cv2.transpose(_area_average(hu.shape[1], size) @ cv2.transpose(low), dst=picture)
    return out


@lru_cache(maxsize=16)
def _area_average(length: int, size: int) -> csr_matrix:
    """(size, length): the share of each of `length` pixels in each of `size` larger ones; rows sum to 1."""
    edges = np.arange(size + 1) * (length / size)
    pixels = np.arange(length)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return csr_matrix((covered.clip(min=0) * (size / length)).astype(np.float32))


def prepare_slice(
    item: Path | FrameOf, out: NDArray[np.float32], windows: tuple[Window, ...], size: int
) -> CTSlice | SetAside | Frames:
    """Write a slice's encoder input to `out`, (windows, size, size); answers where the slice lies.

    What is no usable slice, or does not decode, answers why; `out` then holds anything. So it does for a multi-frame
    file, which answers how many frames may be asked for.
    """
    path, frame = item if isinstance(item, tuple) else (item, None)
    dataset = screened_dataset(path) if frame is None else screened_frame(path, frame)
    if isinstance(dataset, SetAside | Frames):
        return dataset
    try:
        encoder_input(decoded_hu(dataset), windows, size, out)
    except UndecodableSlice as error:
        return SetAside(Reason.UNDECODABLE, str(error), frame=frame)
    return slice_of(path, dataset, frame)
