"""The header of one DICOM file: the few elements that decide what it is and where it lies."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom import config, uid
from pydicom.dataset import FileDataset

# pydicom's warnings quote the value they complain of, and a value may be a patient's.
config.settings.reading_validation_mode = config.IGNORE

HEADER_TAGS = [
    "AcquisitionNumber",
    "BitsAllocated",
    "Columns",
    "ConvolutionKernel",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "ImageType",
    "InstanceNumber",
    "LossyImageCompression",
    "Modality",
    "NumberOfFrames",
    "PatientID",
    "PhotometricInterpretation",
    "PixelSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
    "SamplesPerPixel",
    "SeriesInstanceUID",
    "StudyInstanceUID",
]

PIXEL_DATA = (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10")  # tag (7FE0,0010) in either byte order


class NotDicom(Exception):
    """The file is not a readable DICOM object; the message says what it lacks."""


def read_header(path: Path, also: Sequence[str] = ()) -> FileDataset:
    """The elements of HEADER_TAGS and of `also`. Rows is removed where no PixelData follows. Raises NotDicom."""
    with path.open("rb") as file:
        header = _read(file, specific_tags=[*HEADER_TAGS, *also], stop_before_pixels=True)
        deflated = header.file_meta.get("TransferSyntaxUID") == uid.DeflatedExplicitVRLittleEndian
        if not deflated and file.read(4) not in PIXEL_DATA and "Rows" in header:
            del header.Rows
    return header


def read_whole(path: Path) -> FileDataset:
    """Header and pixels, read once. Rows is removed where there is no PixelData. Raises NotDicom."""
    dataset = _read(io.BytesIO(path.read_bytes()))
    if "PixelData" not in dataset and "Rows" in dataset:
        del dataset.Rows
    return dataset


def texts(header: FileDataset, keyword: str) -> list[str]:
    """The element's values; pydicom gives a single one bare."""
    value = header.get(keyword)
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(each) for each in value]


def _read(file: BinaryIO, **options: Any) -> FileDataset:
    marked = file.read(132)[128:] == b"DICM"  # PS3.10 7.1; older exports lack it and are read all the same
    file.seek(0)
    try:
        dataset = pydicom.dcmread(file, force=True, **options)
        named = "SOPInstanceUID" in dataset
    except Exception as error:  # arbitrary bytes make pydicom raise anything
        raise NotDicom(f"{type(error).__name__} while reading it as DICOM") from error
    if not marked and not named:
        raise NotDicom("no DICM marker at byte 128 and no SOPInstanceUID, expected a DICOM file")
    return dataset
