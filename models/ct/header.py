"""The header of one DICOM file: the few elements that decide what it is and where it lies."""

import io
import logging
import re
import warnings
import zlib
from collections.abc import Callable, Mapping, MutableSequence, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom import config, uid
from pydicom.dataset import FileDataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag

# pydicom's warnings quote the value they complain of, and a value may be a patient's.
config.settings.reading_validation_mode = config.IGNORE
config.logger.setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"pydicom\.")

HEADER_TAGS = [
    "AcquisitionNumber",
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "ConvolutionKernel",
    "DerivationDescription",
    "HighBit",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "InstanceNumber",
    "LossyImageCompression",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PerFrameFunctionalGroupsSequence",
    "PhotometricInterpretation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "SharedFunctionalGroupsSequence",
    "SliceLocation",
    "StudyInstanceUID",
]

# What a slice is as good without: one that cannot be converted counts as missing.
OPTIONAL = [
    "AcquisitionNumber",
    "ConvolutionKernel",
    "DerivationDescription",
    "InstanceNumber",
    "LossyImageCompression",
    "PixelSpacing",
    "RescaleType",
    "SliceLocation",
]

PIXEL_DATA = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # tag (7FE0,0010) in either byte order

MAX_INFLATED = 256 * 2**20  # bytes of a deflated data set: a few of them could ask for any number
GROUP_LENGTH = b"\x02\0\0\0UL\x04\0"  # begins every file's meta information (PS3.10 7.1)
LONGEST_META = 4096  # bytes of it that are searched for the transfer syntax
DEFLATED = re.compile(rb"\x02\0\x10\0.{4}" + re.escape(uid.DeflatedExplicitVRLittleEndian.encode()), re.DOTALL)
CHUNK = 2**20  # bytes


class NotDicom(Exception):
    """The file is not a readable DICOM object; the message says what it lacks."""


def read_header(path: Path, also: Sequence[str | int] = ()) -> FileDataset:
    """The elements of HEADER_TAGS and of `also`. Rows is removed where no PixelData follows. Raises NotDicom."""
    with path.open("rb") as file:
        return header_of(file, also)


def header_of(file: BinaryIO, also: Sequence[str | int] = ()) -> FileDataset:
    """The same of an open file, which is then where its PixelData begins unless it is deflated. Raises NotDicom."""
    tags: list[Any] = [*HEADER_TAGS, *also]
    header = _read(file, partial(pydicom.dcmread, specific_tags=tags, stop_before_pixels=True))
    if header.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
        return header
    start = file.tell()
    if file.read(4) not in PIXEL_DATA and "Rows" in header:
        del header.Rows
    file.seek(start)
    return header


def start_of(file: BinaryIO, tags: Mapping[int, str]) -> dict[str, str]:
    """Text values, ASCII by their representation, of tags in order, by keyword; nothing behind the last tag is read.

    pydicom.dcmread(stop_before_pixels=True) goes on through all of the header. Raises NotDicom.
    """
    last = max(tags)

    def behind(tag: BaseTag, _vr: str | None, _length: int) -> bool:
        return int.__gt__(tag, last)  # BaseTag's own comparison takes as long as reading the element

    header = _read(file, partial(read_partial, stop_when=behind, specific_tags=[*tags]), optional=())
    found = {keyword: header.get_item(tag) for tag, keyword in tags.items()}
    # As it stands in the file: converting an element takes as long as reading the header up to it.
    return {
        keyword: raw.value.decode("ascii", "replace").strip(" \0")
        for keyword, raw in found.items()
        if raw is not None and isinstance(raw.value, bytes)
    }


def read_whole(path: Path) -> FileDataset:
    """Header and pixels, read once. Rows is removed where there is no PixelData. Raises NotDicom."""
    dataset = _read(io.BytesIO(path.read_bytes()))
    if "PixelData" not in dataset and "Rows" in dataset:
        del dataset.Rows
    return dataset


def read_elements(path: Path, longest: int) -> FileDataset:
    """Every element; values of more than `longest` bytes are read from the file when asked for. Raises NotDicom."""
    with path.open("rb") as file:
        dataset = _read(file, partial(pydicom.dcmread, defer_size=longest))
        if dataset.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian:
            file.seek(0)
            dataset = _read(file)  # there is no place in the file to read them from later
    return dataset


def texts(header: FileDataset, keyword: str) -> list[str]:
    """The element's values; pydicom gives a single one bare."""
    value = header.get(keyword)
    if value is None:
        return []
    return [str(each) for each in (value if isinstance(value, MutableSequence) else [value])]


def _read(
    file: BinaryIO, read: Callable[..., FileDataset] = pydicom.dcmread, optional: Sequence[str] = OPTIONAL
) -> FileDataset:
    marked = file.read(132)[128:] == b"DICM"  # PS3.10 7.1; older exports lack it and are read all the same
    _check_inflated(file)
    file.seek(0)
    try:
        dataset = read(file, force=True)
        named = "SOPInstanceUID" in dataset
    except Exception as error:  # arbitrary bytes make pydicom raise anything
        raise NotDicom(f"{type(error).__name__} while reading it as DICOM") from error
    if not marked and not named:
        raise NotDicom("no DICM marker at byte 128 and no SOPInstanceUID, expected a DICOM file")
    for keyword in optional:
        try:
            dataset.get(keyword)
        except Exception:  # pydicom converts values when they are asked for
            delattr(dataset, keyword)
    return dataset


def _check_inflated(file: BinaryIO) -> None:
    """Raises NotDicom for a deflated data set (PS3.5 A.5) that is too long, which pydicom would inflate at once."""
    meta = file.read(LONGEST_META)
    if not DEFLATED.search(meta):
        return
    if meta[:8] != GROUP_LENGTH:
        raise NotDicom("a deflated file without FileMetaInformationGroupLength")
    file.seek(144 + int.from_bytes(meta[8:12], "little"))
    inflater, inflated = zlib.decompressobj(-zlib.MAX_WBITS), 0
    try:
        while chunk := inflater.unconsumed_tail or file.read(CHUNK):
            inflated += len(inflater.decompress(chunk, CHUNK))
            if inflated > MAX_INFLATED:
                raise NotDicom(f"a deflated data set of more than {MAX_INFLATED} bytes")
    except zlib.error as error:
        raise NotDicom("a deflated data set that does not inflate") from error
