"""Which DICOM files are axial CT slices, and why the others are not."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import CTImageStorage

from models.ct.decode import DECODERS
from models.ct.header import NotDicom, read_header, read_whole, start_of, texts
from models.ct.multiframe import (
    MULTIFRAME_CLASSES,
    BadFrames,
    frame_count,
    frame_headers,
    frame_with_pixels,
    is_multiframe,
)
from models.ct.reasons import UID, Reason

# A gantry tilts by at most 30 degrees; a slice farther than this from the axial plane is a reformat.
MAX_TILT_DEGREES = 35.0

# Either way a stored value times slope plus intercept is the HU: MONOCHROME1 inverts the display, after any
# window (PS3.3 C.7.6.3.1.2, C.8.2.1.1.2).
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")

# A file of more bytes than any single slice has may hold a thousand frames; its header says so before it is read whole.
LARGE_FILE_BYTES = 4 * 2**20

# What _identity() asks for.
IDENTITY = {
    0x00080018: "SOPInstanceUID",
    0x00080060: "Modality",
    0x0020000D: "StudyInstanceUID",
    0x0020000E: "SeriesInstanceUID",
}

# Units of rescaled values that are no HU: optical density, and maps of a multi-energy CT (PS3.3 C.11.1.1.2).
NOT_HU = ("OD", "MGML", "Z_EFF", "ED", "EDW", "PCT")


@dataclass(frozen=True)
class SetAside:
    reason: Reason
    detail: str  # what was found and what was expected; never a patient's data
    series_uid: str = ""  # where the header names one
    frame: int | None = None  # of a multi-frame file, from 1


@dataclass(frozen=True)
class Frames:
    """The file holds this many frames, each to be asked for by its number."""

    count: int


def series_of(file: BinaryIO) -> str | SetAside:
    """The SeriesInstanceUID of an open CT file, from the beginning of its header alone; or why the file is set aside.

    What is no CT, or cannot be told from others, is found here; whether it is a usable slice, by screened_header().
    """
    try:
        header = start_of(file, IDENTITY)
    except NotDicom as error:
        return SetAside(Reason.NOT_DICOM, str(error))
    found = _first_of(check(header) for check in (_identity,))
    uid = _series_uid(header)
    return replace(found, series_uid=uid) if found else uid


def screened_header(path: Path) -> FileDataset | SetAside:
    """The header of a usable axial CT slice, or of a multi-frame file with one at least; or why the file is none."""
    return _screened(path, read_header)


def screened_headers(path: Path) -> list[tuple[int | None, FileDataset | SetAside]]:
    """The same slice by slice: of a multi-frame file every frame under its number, else the one slice under None."""
    header = screened_header(path)
    if isinstance(header, SetAside) or not is_multiframe(header):
        return [(None, header)]
    return [(number, _of_frame(number, frame)) for number, frame in enumerate(frame_headers(header), start=1)]


def screened_dataset(path: Path) -> FileDataset | SetAside | Frames:
    """A usable slice with its pixels, which are not decoded yet; for a multi-frame file, how many frames it has."""
    found = _screened(path, _read_whole_unless_frames)
    return Frames(frame_count(found)) if isinstance(found, FileDataset) and is_multiframe(found) else found


def screened_frame(path: Path, number: int) -> FileDataset | SetAside:
    """A frame, from 1, as a usable slice with its pixels, or why it is none."""
    try:
        return _of_frame(number, frame_with_pixels(path, number))
    except NotDicom as error:
        return SetAside(Reason.NOT_DICOM, str(error), frame=number)
    except OSError:
        raise  # a disk that fails is no fault of the frame
    except Exception as error:  # offsets may lead anywhere
        return SetAside(Reason.UNDECODABLE, f"{type(error).__name__} while reading frame {number}", frame=number)


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


def _read_whole_unless_frames(path: Path) -> FileDataset:
    """Header and pixels; of a large file of many frames the header alone."""
    if path.stat().st_size > LARGE_FILE_BYTES:
        header = read_header(path)
        with suppress(Exception):  # NumberOfFrames is no number, which screening will say
            if is_multiframe(header):
                return header
    return read_whole(path)


def _screened(path: Path, read: Callable[[Path], FileDataset]) -> FileDataset | SetAside:
    try:
        dataset = read(path)
    except NotDicom as error:
        return SetAside(Reason.NOT_DICOM, str(error))
    found = _screen(dataset)
    return replace(found, series_uid=_series_uid(dataset)) if found else dataset


def _series_uid(dataset: FileDataset | dict[str, str]) -> str:
    try:
        return str(dataset.get("SeriesInstanceUID", ""))
    except Exception:  # as in _first_of()
        return ""


def _of_frame(number: int, frame: FileDataset) -> FileDataset | SetAside:
    found = _screen(frame)
    return replace(found, frame=number) if found else frame


def _screen(header: FileDataset) -> SetAside | None:
    return _first_of(_complaints(header))


def _first_of(complaints: Iterator[SetAside | None]) -> SetAside | None:
    try:
        return next(filter(None, complaints), None)
    except BadFrames as error:
        return SetAside(Reason.MULTIFRAME, str(error))
    except Exception as error:  # pydicom converts values when they are read, and a broken one raises anything
        return SetAside(Reason.UNREADABLE_HEADER, f"{type(error).__name__} while reading the header")


def _complaints(header: FileDataset) -> Iterator[SetAside | None]:
    yield _identity(header)
    yield _object(header)
    yield _pixels(header)
    if is_multiframe(header):
        yield _frames(header)
    else:
        yield _kind(header)
        yield _rescale(header)
        yield _geometry(header)


def _frames(header: FileDataset) -> SetAside | None:
    """Why no frame is usable; the commonest reason speaks for all."""
    reasons: Counter[Reason] = Counter()
    for frame in frame_headers(header):
        if (found := _screen(frame)) is None:
            return None
        reasons[found.reason] += 1
    (reason, count), *_ = reasons.most_common(1)
    return SetAside(reason, f"none of {reasons.total()} frames is usable, {count} for this reason")


def _identity(header: FileDataset | dict[str, str]) -> SetAside | None:
    modality = str(header.get("Modality", ""))
    if modality != "CT":
        return SetAside(Reason.NOT_CT, f"Modality is {modality or 'missing'}, expected CT")
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID", "StudyInstanceUID"):
        if not UID.fullmatch(str(header.get(keyword, ""))):
            return SetAside(Reason.INVALID_UID, f"{keyword} is missing or not a UID of at most 64 digits and dots")
    return None


def _object(header: FileDataset) -> SetAside | None:
    sop_class = header.get("SOPClassUID") or CTImageStorage  # some exports strip it; Modality has said CT
    if sop_class not in (CTImageStorage, *MULTIFRAME_CLASSES):
        name = getattr(sop_class, "name", str(sop_class))
        return SetAside(Reason.SECONDARY_CAPTURE, f"SOP class is {name}, expected CT Image Storage")
    return None


def _kind(header: FileDataset) -> SetAside | None:
    image_type = [value.upper() for value in texts(header, "ImageType")]
    if any("LOCALIZER" in value or "SCOUT" in value for value in image_type):
        return SetAside(Reason.LOCALIZER, f"ImageType is {'/'.join(image_type)}, expected an axial slice")
    if "SCREEN SAVE" in image_type or "DOSE" in image_type:
        return SetAside(Reason.SECONDARY_CAPTURE, f"ImageType is {'/'.join(image_type)}, expected an axial slice")
    return None


def _pixels(header: FileDataset) -> SetAside | None:
    rows, columns = header.get("Rows"), header.get("Columns")
    if not rows or not columns or not header.get("BitsAllocated"):
        return SetAside(Reason.NO_PIXELS, "Rows, Columns or BitsAllocated is missing or zero")
    if header.get("SamplesPerPixel", 1) != 1:
        return SetAside(Reason.NOT_GRAYSCALE, f"SamplesPerPixel is {header.SamplesPerPixel}, expected 1")
    if header.get("PhotometricInterpretation", "MONOCHROME2") not in MONOCHROME:
        found = header.PhotometricInterpretation
        return SetAside(Reason.NOT_GRAYSCALE, f"PhotometricInterpretation is {found}, expected MONOCHROME1 or 2")
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
    unit = str(header.get("RescaleType") or "").upper()
    if unit in NOT_HU:
        return SetAside(Reason.NOT_HU, f"RescaleType is {unit}, expected HU")
    return None


def _geometry(header: FileDataset) -> SetAside | None:
    orientation = numbers(header, "ImageOrientationPatient", 6)
    placed = numbers(header, "ImagePositionPatient", 3) is not None or numbers(header, "SliceLocation", 1) is not None
    if not placed or orientation is None:
        return SetAside(Reason.NO_POSITION, "ImagePositionPatient or ImageOrientationPatient is missing or unreadable")
    if np.linalg.norm(np.cross(orientation[:3], orientation[3:])) < 0.5:
        return SetAside(Reason.NO_POSITION, "ImageOrientationPatient does not span a plane")
    tilt = tilt_degrees(slice_normal(orientation))
    if tilt > MAX_TILT_DEGREES:
        detail = f"{tilt:.0f} degrees from the axial plane, expected at most {MAX_TILT_DEGREES:.0f}"
        return SetAside(Reason.NOT_AXIAL, detail)
    return None
