"""Synthetic CT patients: chests with true HU, half of them with a lung lesion at known slices.

They are for demonstrations and tests, where the truth must be known and nobody's data may be used. A head
that tells them apart says nothing about real patients.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid
from scipy.ndimage import gaussian_filter

Floats = NDArray[np.float32]

AIR, LUNG, FAT, SOFT_TISSUE, BLOOD, MARROW, CORTEX = -1000.0, -860.0, -100.0, 45.0, 120.0, 180.0, 700.0  # HU
NOISE = 18.0  # HU, standard deviation after the reconstruction's smoothing


@dataclass(frozen=True)
class Phantom:
    hu: Floats  # (slices, rows, columns), feet to head
    spacing_mm: tuple[float, float, float]  # between slices, rows, columns
    lesion_slices: tuple[int, ...]  # those the lesion's volume reaches


def chest(seed: int, lesion: bool, slices: int = 20, size: int = 256) -> Phantom:
    """A chest of its own shape for every seed; with `lesion`, a solid lung mass of 36 to 56 mm."""
    random = np.random.default_rng(seed)
    spacing = (10.0, 360.0 / size, 360.0 / size)
    z, y, x = np.meshgrid(
        (np.arange(slices) - slices / 2) * spacing[0],
        (np.arange(size) - size / 2) * spacing[1],
        (np.arange(size) - size / 2) * spacing[2],
        indexing="ij",
    )
    scale = random.uniform(0.88, 1.08)
    hu = np.full(x.shape, AIR, dtype=np.float32)

    def paint(value: float, centre: Iterable[float], radii: Iterable[float]) -> NDArray[np.bool_]:
        """Set an ellipsoid, given in mm as (z, y, x), to a value."""
        offsets = [(axis - c * scale) / (r * scale) for axis, c, r in zip((z, y, x), centre, radii, strict=True)]
        inside: NDArray[np.bool_] = sum(offset**2 for offset in offsets) <= 1.0
        hu[inside] = value
        return inside

    paint(FAT, (0, 0, 0), (1000, 108, 158))
    paint(SOFT_TISSUE, (0, 0, 0), (1000, 108 - random.uniform(8, 20), 158 - random.uniform(8, 20)))
    lungs = [
        paint(LUNG, (random.uniform(-5, 15), -5, side * 74), (random.uniform(95, 120), random.uniform(66, 76), 48))
        for side in (-1, 1)
    ]
    paint(SOFT_TISSUE, (-30, -25, 18), (60, random.uniform(38, 48), random.uniform(46, 58)))  # heart
    paint(BLOOD, (0, 38, 16), (1000, 12, 12))  # descending aorta
    paint(CORTEX, (0, 66, 0), (1000, 17, 20))  # vertebrae
    paint(MARROW, (0, 66, 0), (1000, 14, 17))
    paint(SOFT_TISSUE, (0, 86, 0), (1000, 8, 8))  # spinal canal
    for level in range(-4, 5):  # ribs cross each level on both sides
        for side in (-1, 1):
            paint(CORTEX, (level * 24 + random.uniform(-4, 4), random.uniform(-40, 40), side * 132), (6, 14, 5))
    for lung in lungs:
        _vessels(random, hu, lung)
    reached: tuple[int, ...] = ()
    if lesion:
        side = random.choice([-1, 1])
        centre = (random.uniform(-50, 60), random.uniform(-30, 25), side * random.uniform(66, 90))
        radii = random.uniform(18, 28, size=3)
        mass = paint(random.uniform(20, 60), centre, radii)
        reached = tuple(int(k) for k in np.flatnonzero(mass.any(axis=(1, 2))))
    hu = gaussian_filter(hu, (0, 0.7, 0.7))
    hu += gaussian_filter(random.normal(size=hu.shape).astype(np.float32), (0, 0.7, 0.7)) * NOISE * 2.4
    return Phantom(np.clip(hu, -1024, 3071), spacing, reached)


def _vessels(random: np.random.Generator, hu: Floats, lung: NDArray[np.bool_]) -> None:
    """Small dots of blood through the lung: what a lesion must be told from."""
    inside = np.argwhere(lung)
    for k, row, column in inside[random.integers(len(inside), size=500)]:
        radius = int(random.integers(0, 2))
        patch = (k, slice(row - radius, row + radius + 1), slice(column - radius, column + radius + 1))
        hu[patch] = np.where(lung[patch], SOFT_TISSUE, hu[patch])


@dataclass(frozen=True)
class Identity:
    """Who a synthetic series says it is of; UIDs follow from the name, so the same patient is the same series."""

    patient_id: str
    study: str = "1"
    series: str = "1"
    series_uid: str = field(init=False)
    study_uid: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "series_uid", self.uid("series", self.study, self.series))
        object.__setattr__(self, "study_uid", self.uid("study", self.study))

    def uid(self, *parts: str) -> str:
        return generate_uid(entropy_srcs=["keyslice", self.patient_id, *parts])


def write_series(folder: Path, hu: Floats, spacing_mm: tuple[float, float, float], identity: Identity) -> list[Path]:
    """Write (slices, rows, columns) HU as a CT series, one file per slice, feet to head."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, pixels in enumerate(hu):
        path = folder / f"{number:04d}.dcm"
        ct_slice(pixels, number * spacing_mm[0], number, spacing_mm, identity).save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths


def ct_slice(
    hu: Floats, z_mm: float, number: int, spacing_mm: tuple[float, float, float], identity: Identity
) -> FileDataset:
    """One axial CT Image Storage object (PS3.3 A.3) with rescale intercept -1024."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID = meta.MediaStorageSOPClassUID = CTImageStorage
    sop_uid = UID(identity.uid("slice", identity.study, identity.series, str(number)))
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = sop_uid
    dataset.PatientID, dataset.PatientName = identity.patient_id, "Synthetic^Phantom"
    dataset.PatientBirthDate, dataset.PatientSex = "", "O"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = identity.study_uid, identity.series_uid
    dataset.FrameOfReferenceUID = identity.uid("frame", identity.study)
    dataset.StudyDate, dataset.StudyTime, dataset.StudyID = "20200101", "120000", identity.study
    dataset.Modality, dataset.Manufacturer, dataset.ImageType = (
        "CT",
        "Keyslice phantom",
        ["ORIGINAL", "PRIMARY", "AXIAL"],
    )
    dataset.SeriesNumber, dataset.InstanceNumber, dataset.AcquisitionNumber = 1, number + 1, 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    corner = [-pixels / 2 * step for pixels, step in zip(hu.shape[::-1], spacing_mm[:0:-1], strict=True)]
    dataset.ImagePositionPatient = [*corner, z_mm]
    dataset.PixelSpacing, dataset.SliceThickness = [spacing_mm[1], spacing_mm[2]], spacing_mm[0]
    dataset.ConvolutionKernel, dataset.KVP = "STANDARD", 120
    dataset.Rows, dataset.Columns = hu.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = 1, -1024, "HU"
    dataset.PixelData = np.round(hu + 1024).astype("<u2").tobytes()
    return dataset
