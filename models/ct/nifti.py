"""A NIfTI volume as axial CT slices in DICOM, so that everything after it is one way."""

import gzip
import hashlib
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian
from pydicom.valuerep import format_number_as_ds

from models.ct.reasons import Reason

GZIP = b"\x1f\x8b"
# Where each version of the format says what it is: an offset, and the bytes there.
MAGIC = ((344, b"n+1\0"), (344, b"ni1\0"), (4, b"n+2\0"), (4, b"ni2\0"))
HEADER_BYTES = 348
CHUNK = 2**20  # bytes

# DerivationDescription of a slice made here; the lowest and highest value of the volume follow.
DERIVATION = "Keyslice: NIfTI, values taken as HU,"
NUMBER = r"(-?[\d.]+(?:e[+-]\d+)?)"
DERIVED = re.compile(rf"{DERIVATION} from {NUMBER} to {NUMBER}")
EIGHT_BITS = (-1.0, 255.0)  # values within are those of a picture, a mask, or a network's input
LONGEST_SIDE = 4096  # voxels; DICOM slices have no more (models/ct/decode.py), and no patient is longer
SQUARE = 1e-3  # cosine between rows and columns, from rounding

TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # NIfTI counts to the right and front, DICOM to the left and back
UNIT_MM = {"meter": 1000.0, "mm": 1.0, "micron": 0.001, "unknown": 1.0}

Doubles = NDArray[np.float64]


class UnusableNifti(Exception):
    """The file makes no CT series: the reason, and what was found and expected."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class InflatesTooFar(UnusableNifti):
    """The compressed file holds more bytes than it may."""


def is_nifti(path: Path) -> bool:
    """Whether the file says that it is NIfTI, compressed or not."""
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if start.startswith(GZIP):
        try:
            with gzip.open(path) as inflated:
                start = inflated.read(HEADER_BYTES)
        except (OSError, EOFError, zlib.error):
            return False
    return start[128:132] != b"DICM" and any(start[at : at + len(magic)] == magic for at, magic in MAGIC)


def nifti_range(derivation: str) -> tuple[float, float] | None:
    """The lowest and highest value of the volume that a slice was made from, by its DerivationDescription."""
    found = DERIVED.fullmatch(derivation)
    return (float(found[1]), float(found[2])) if found else None


def nifti_slices(path: Path, folder: Path, patient_id: str = "", max_bytes: int = 2**40) -> Iterator[Path]:
    """Write the volume to `folder` as CT slices, feet to head; rows run to the back, columns to the left.

    UIDs follow from the content, so the same volume is the same series. `max_bytes` is what a compressed file may
    inflate to. Raises UnusableNifti before the first slice.
    """
    plain = folder / "volume.nii"
    digest = _plain_copy(path, plain, max_bytes)
    volume = _opened(plain)
    low, high = volume.range_hu
    _check_hu(low, high)
    series = _series_elements(digest, patient_id, f"{DERIVATION} from {low:g} to {high:g}")
    for k in range(volume.count):
        target = folder / f"{k:05d}.dcm"
        _slice(volume, k, series, digest).save_as(target, enforce_file_format=True)
        yield target
    plain.unlink()


@dataclass(frozen=True)
class _Volume:
    voxels: NDArray[Any]  # (columns to the left, rows to the back, slices to the head), as stored
    slope: float
    intercept: float
    affine: Doubles  # (4, 4), voxel indices to the patient's coordinates in mm (PS3.3 C.7.6.2.1.1)

    @property
    def count(self) -> int:
        return int(self.voxels.shape[2])

    @cached_property
    def range_stored(self) -> tuple[float, float]:
        """The lowest and highest stored value; a slice is in memory at a time."""
        extremes = np.array([(self.voxels[:, :, k].min(), self.voxels[:, :, k].max()) for k in range(self.count)])
        return float(extremes[:, 0].min()), float(extremes[:, 1].max())  # NaN where any is

    @property
    def range_hu(self) -> tuple[float, float]:
        low, high = sorted(value * self.slope + self.intercept for value in self.range_stored)
        return low, high

    def stored(self, k: int) -> tuple[NDArray[Any], float, float]:
        """A slice as 16-bit (rows, columns) with slope and intercept. What fits 16 bits as it is stays so."""
        plane = np.ascontiguousarray(self.voxels[:, :, k].T)
        low, high = self.range_stored
        if self.voxels.dtype.kind in "iu":
            for kind in (np.int16, np.uint16):
                if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
                    return plane.astype(kind), self.slope, self.intercept
        return np.rint(plane.astype(np.float64) * self.slope + self.intercept).astype(np.int16), 1.0, 0.0


def _plain_copy(path: Path, target: Path, max_bytes: int) -> str:
    """The file without its compression, and the SHA-256 of that."""
    digest, written = hashlib.sha256(), 0
    with path.open("rb") as file:
        compressed = file.read(2) == GZIP
    if not compressed:
        os.link(path, target)
        with target.open("rb") as plain:
            return hashlib.file_digest(plain, "sha256").hexdigest()
    try:
        with gzip.open(path) as source, target.open("wb") as copy:
            while chunk := source.read(CHUNK):
                written += len(chunk)
                if written > max_bytes:
                    raise InflatesTooFar(Reason.NOT_A_VOLUME, "it inflates beyond the limit of an upload")
                digest.update(chunk)
                copy.write(chunk)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnusableNifti(Reason.NOT_A_VOLUME, "the compressed file is broken or truncated") from error
    return digest.hexdigest()


def _opened(path: Path) -> _Volume:
    try:
        return _volume(path)
    except UnusableNifti:
        raise
    except Exception as error:  # a header may hold anything
        raise UnusableNifti(Reason.NOT_A_VOLUME, f"{type(error).__name__} while reading it as NIfTI") from error


def _volume(path: Path) -> _Volume:
    import nibabel as nib  # half a second, and only for those who send NIfTI

    orientations: Any = nib.orientations  # it has no types
    image: Any = nib.load(path)
    shape, dtype = image.shape, image.get_data_dtype()
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1 or max(shape) > LONGEST_SIDE:
        raise UnusableNifti(Reason.NOT_A_VOLUME, f"{' x '.join(map(str, shape))} voxels, expected three dimensions")
    if dtype.kind not in "iuf":
        raise UnusableNifti(Reason.NOT_GRAYSCALE, f"voxels of type {dtype}, expected whole or real numbers")
    if image.dataobj.offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise UnusableNifti(Reason.NOT_A_VOLUME, "the file ends before its last voxel")
    affine = _affine(image)
    voxels = np.memmap(path, dtype, "r", image.dataobj.offset, shape, order="F")
    turn = orientations.ornt_transform(orientations.io_orientation(affine), orientations.axcodes2ornt(("L", "P", "S")))
    turned = TO_LPS @ affine @ orientations.inv_ornt_aff(turn, shape)
    _check_square(turned)
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    return _Volume(orientations.apply_orientation(voxels, turn), slope, intercept, turned)


def _affine(image: Any) -> Doubles:
    """Voxel indices to NIfTI's coordinates in mm, by sform, or by qform where there is none."""
    if not image.header["sform_code"] and not image.header["qform_code"]:
        raise UnusableNifti(Reason.NO_POSITION, "neither sform nor qform is set, expected one of them")
    affine = np.array(image.affine, dtype=np.float64)
    affine[:3] *= UNIT_MM.get(image.header.get_xyzt_units()[0], 1.0)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UnusableNifti(Reason.NO_POSITION, "the affine does not span a volume")
    return affine


def _check_square(affine: Doubles) -> None:
    columns, rows = (affine[:3, k] / np.linalg.norm(affine[:3, k]) for k in (0, 1))
    if abs(columns @ rows) > SQUARE:
        raise UnusableNifti(Reason.NO_POSITION, "rows and columns of the affine are not at right angles")


def _check_hu(low: float, high: float) -> None:
    found = f"values from {low:g} to {high:g}"
    if not np.isfinite([low, high]).all():
        raise UnusableNifti(Reason.NOT_HU, "values that are not finite, expected HU")
    if EIGHT_BITS[0] <= low and high <= EIGHT_BITS[1]:
        raise UnusableNifti(Reason.NOT_HU, f"{found}, expected HU with air near -1000")
    if low == high or low < np.iinfo(np.int16).min or high > np.iinfo(np.int16).max:
        raise UnusableNifti(Reason.NOT_HU, f"{found}, expected those of a CT, which 16 bits hold")


def _series_elements(digest: str, patient_id: str, derivation: str) -> Dataset:
    """What all slices of the series say."""
    shared = Dataset()
    shared.SpecificCharacterSet = "ISO_IR 192"
    shared.SOPClassUID, shared.Modality = CTImageStorage, "CT"
    shared.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    shared.PatientID, shared.PatientName, shared.PatientBirthDate, shared.PatientSex = patient_id, "", "", ""
    shared.StudyDate = shared.StudyTime = shared.StudyID = shared.AccessionNumber = ""
    shared.StudyInstanceUID, shared.SeriesInstanceUID = _uid(digest, "study"), _uid(digest, "series")
    shared.FrameOfReferenceUID = _uid(digest, "frame of reference")
    shared.SeriesDescription, shared.DerivationDescription = "NIfTI", derivation
    shared.SamplesPerPixel, shared.PhotometricInterpretation = 1, "MONOCHROME2"
    shared.BitsAllocated, shared.BitsStored, shared.HighBit, shared.RescaleType = 16, 16, 15, "HU"
    return shared


def _slice(volume: _Volume, k: int, series: Dataset, digest: str) -> FileDataset:
    pixels, slope, intercept = volume.stored(k)
    columns, rows, slices, corner = (volume.affine[:3, axis] for axis in range(4))
    column_mm, row_mm = float(np.linalg.norm(columns)), float(np.linalg.norm(rows))
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    dataset = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    dataset.update(series)
    dataset.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = _uid(digest, f"slice {k}")
    dataset.InstanceNumber = k + 1
    dataset.ImageOrientationPatient = _decimals([*(columns / column_mm), *(rows / row_mm)])
    dataset.ImagePositionPatient = _decimals(corner + k * slices)
    dataset.PixelSpacing = _decimals([row_mm, column_mm])
    dataset.SliceThickness = _decimals([float(np.linalg.norm(slices))])[0]
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.PixelRepresentation = int(pixels.dtype == np.int16)
    dataset.RescaleSlope, dataset.RescaleIntercept = _decimals([slope, intercept])
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    return dataset


def _uid(digest: str, part: str) -> UID:
    """A UID that follows from the volume's content (PS3.5 B.2)."""
    made = hashlib.sha256(f"{digest} {part}".encode()).digest()
    return UID(f"2.25.{uuid.UUID(bytes=made[:16], version=5).int}")


def _decimals(values: Any) -> list[str]:
    """As decimal strings of at most 16 characters (PS3.5 6.2)."""
    return [format_number_as_ds(float(value) + 0.0) for value in values]
