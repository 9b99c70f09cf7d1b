"""Small valid CT series with known HU, which a test may spoil before they are written."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset

from models.ct.phantom import Identity, ct_slice

IDENTITY = Identity("synthetic patient")
SPACING = (5.0, 0.75, 0.75)  # mm between slices, rows, columns


def random_hu(slices: int = 6, size: int = 32, seed: int = 0) -> NDArray[np.float32]:
    """(slices, size, size) of whole HU, so that storing them loses nothing."""
    return np.random.default_rng(seed).integers(-1024, 2000, (slices, size, size)).astype(np.float32)


def write_ct(
    folder: Path,
    hu: Sequence[NDArray[np.float32]] | NDArray[np.float32] | None = None,
    change: Callable[[int, FileDataset], None] | None = None,
    identity: Identity = IDENTITY,
) -> list[Path]:
    """One file per slice, feet to head, 5 mm apart; `change(number, dataset)` may spoil each before it is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pixels in enumerate(random_hu() if hu is None else hu):
        dataset = ct_slice(pixels, number * SPACING[0], number, SPACING, identity)
        if change:
            change(number, dataset)
        paths.append(folder / f"{number:04d}.dcm")
        dataset.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_slice(
    folder: Path, change: Callable[[FileDataset], None] | None = None, hu: NDArray[np.float32] | None = None
) -> Path:
    """A series of one slice."""
    pixels = random_hu(slices=1) if hu is None else hu[np.newaxis]
    return write_ct(folder, pixels, (lambda _, dataset: change(dataset)) if change else None)[0]
