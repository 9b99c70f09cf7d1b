"""Which DICOM files are axial CT slices, and why the others are not."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from models.ct.decode import DECODERS
from models.ct.header import NotDicom, read_header, read_whole, texts

# PS3.5 9.1: at most 64 characters, digits and single dots. It names files here, so nothing else may pass.
UID = re.compile(r"(?=.{1,64}\Z)[0-9]+(\.[0-9]+)*")

# A gantry tilts by at most 30 degrees; a slice farther than this from the axial plane is a reformat.
MAX_TILT_DEGREES = 35.0


class Reason(StrEnum):
    """Why a file or slice was set aside: stable words that programs may compare."""

    NOT_DICOM = "not_dicom"
    UNREADABLE_HEADER = "unreadable_header"
    NOT_CT = "not_ct"
    INVALID_UID = "invalid_uid"
    MULTIFRAME = "multiframe"
    LOCALIZER = "localizer"
    SECONDARY_CAPTURE = "secondary_capture"
    NO_PIXELS = "no_pixels"
    NOT_GRAYSCALE = "not_grayscale"
    NO_POSITION = "no_position"
    NOT_AXIAL = "not_axial"
    BAD_RESCALE = "bad_rescale"
    UNSUPPORTED_TRANSFER_SYNTAX = "unsupported_transfer_syntax"
    UNDECODABLE = "undecodable"
    NO_VOLUME = "no_volume"
    ORIENTATION_DIFFERS = "orientation_differs"
    DUPLICATE_POSITION = "duplicate_position"
    SERIES_OF_ANOTHER_PATIENT = "series_of_another_patient"


@dataclass(frozen=True)
class SetAside:
    reason: Reason
    detail: str  # what was found and what was expected; never a patient's data
    series_uid: str = ""  # where the header names one


def screened_header(path: Path) -> FileDataset | SetAside:
    """The header of a usable axial CT slice, or why the file is none."""
    return _screened(path, read_header)


def screened_dataset(path: Path) -> FileDataset | SetAside:
    """The same with its pixels, which are not decoded yet."""
    return _screened(path, read_whole)


def slice_normal(orientation: NDArray[np.float64]) -> NDArray[np.float64]:
    """The slice's unit normal pointing to the head, from ImageOrientationPatient (PS3.3 C.7.6.2.1.1).

    +z of the patient coordinate system points to the head; the cross product of the row and column
    directions points either way.
    """
    normal = np.cross(orientation[:3], orientation[3:])
    normal /= np.linalg.norm(normal)
    return normal if normal[2] >= 0 else -normal


def tilt_degrees(normal: NDArray[np.float64]) -> float:
    """Angle between the slice's normal and the patient's long axis."""
    return float(np.degrees(np.arccos(np.clip(abs(normal[2]), 0.0, 1.0))))


def numbers(header: FileDataset, keyword: str, count: int) -> NDArray[np.float64] | None:
    """The element's values as floats, or None where it is missing, short, or not finite."""
    try:
        values = np.array(header.get(keyword), dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _screened(path: Path, read: Callable[[Path], FileDataset]) -> FileDataset | SetAside:
    try:
        dataset = read(path)
    except NotDicom as error:
        return SetAside(Reason.NOT_DICOM, str(error))
    found = _screen(dataset)
    return replace(found, series_uid=_series_uid(dataset)) if found else dataset


def _series_uid(dataset: FileDataset) -> str:
    try:
        return str(dataset.get("SeriesInstanceUID", ""))
    except Exception:  # as in _screen()
        return ""


def _screen(header: FileDataset) -> SetAside | None:
    try:
        return next(filter(None, (check(header) for check in (_identity, _kind, _pixels, _rescale, _geometry))), None)
    except Exception as error:  # pydicom converts values when they are read, and a broken one raises anything
        return SetAside(Reason.UNREADABLE_HEADER, f"{type(error).__name__} while reading the header")


def _identity(header: FileDataset) -> SetAside | None:
    modality = str(header.get("Modality", ""))
    if modality != "CT":
        return SetAside(Reason.NOT_CT, f"Modality is {modality or 'missing'}, expected CT")
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID", "StudyInstanceUID"):
        if not UID.fullmatch(str(header.get(keyword, ""))):
            return SetAside(Reason.INVALID_UID, f"{keyword} is missing or not a UID of at most 64 digits and dots")
    return None


def _kind(header: FileDataset) -> SetAside | None:
    image_type = [value.upper() for value in texts(header, "ImageType")]
    sop_class = header.get("SOPClassUID") or CTImageStorage  # some exports strip it; Modality has said CT
    if sop_class in (EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage):
        return SetAside(Reason.MULTIFRAME, "multi-frame CT is not read yet, expected one slice per file")
    if any("LOCALIZER" in value or "SCOUT" in value for value in image_type):
        return SetAside(Reason.LOCALIZER, f"ImageType is {'/'.join(image_type)}, expected an axial slice")
    if sop_class != CTImageStorage:
        name = getattr(sop_class, "name", str(sop_class))
        return SetAside(Reason.SECONDARY_CAPTURE, f"SOP class is {name}, expected CT Image Storage")
    if "SCREEN SAVE" in image_type or "DOSE" in image_type:
        return SetAside(Reason.SECONDARY_CAPTURE, f"ImageType is {'/'.join(image_type)}, expected an axial slice")
    return None


def _pixels(header: FileDataset) -> SetAside | None:
    rows, columns = header.get("Rows"), header.get("Columns")
    if not rows or not columns or not header.get("BitsAllocated"):
        return SetAside(Reason.NO_PIXELS, "Rows, Columns or BitsAllocated is missing or zero")
    if int(header.get("NumberOfFrames") or 1) != 1:
        return SetAside(Reason.MULTIFRAME, f"{header.NumberOfFrames} frames in one file, expected 1")
    if header.get("SamplesPerPixel", 1) != 1:
        return SetAside(Reason.NOT_GRAYSCALE, f"SamplesPerPixel is {header.SamplesPerPixel}, expected 1")
    if header.get("PhotometricInterpretation", "MONOCHROME2") != "MONOCHROME2":
        found = header.PhotometricInterpretation
        return SetAside(Reason.NOT_GRAYSCALE, f"PhotometricInterpretation is {found}, expected MONOCHROME2")
    syntax = header.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax not in DECODERS:
        return SetAside(Reason.UNSUPPORTED_TRANSFER_SYNTAX, f"no decoder for {syntax.name} ({syntax})")
    return None


def _rescale(header: FileDataset) -> SetAside | None:
    for keyword in ("RescaleSlope", "RescaleIntercept"):
        if header.get(keyword) is not None and numbers(header, keyword, 1) is None:
            return SetAside(Reason.BAD_RESCALE, f"{keyword} is not one finite number")
    slope = numbers(header, "RescaleSlope", 1)
    if slope is not None and slope[0] == 0:
        return SetAside(Reason.BAD_RESCALE, "RescaleSlope is 0")
    return None


def _geometry(header: FileDataset) -> SetAside | None:
    orientation = numbers(header, "ImageOrientationPatient", 6)
    if numbers(header, "ImagePositionPatient", 3) is None or orientation is None:
        return SetAside(Reason.NO_POSITION, "ImagePositionPatient or ImageOrientationPatient is missing or unreadable")
    if np.linalg.norm(np.cross(orientation[:3], orientation[3:])) < 0.5:
        return SetAside(Reason.NO_POSITION, "ImageOrientationPatient does not span a plane")
    tilt = tilt_degrees(slice_normal(orientation))
    if tilt > MAX_TILT_DEGREES:
        detail = f"{tilt:.0f} degrees from the axial plane, expected at most {MAX_TILT_DEGREES:.0f}"
        return SetAside(Reason.NOT_AXIAL, detail)
    return None
