"""The frames of a multi-frame CT file, each as the dataset that a file of its own would hold."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from pydicom import uid
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.tag import BaseTag, Tag

from models.ct.header import header_of, read_whole

MULTIFRAME_CLASSES = (uid.EnhancedCTImageStorage, uid.LegacyConvertedEnhancedCTImageStorage)

SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"

# What a functional group says of a frame (PS3.3 C.7.6.16.2 and C.8.15.3), by the name it has in a single-frame header.
GROUPS: dict[str, dict[str, str]] = {
    "CTImageFrameTypeSequence": {"FrameType": "ImageType"},
    "CTReconstructionSequence": {"ConvolutionKernel": "ConvolutionKernel"},
    "FrameContentSequence": {"FrameAcquisitionNumber": "AcquisitionNumber"},
    "PixelMeasuresSequence": {"PixelSpacing": "PixelSpacing"},
    "PixelValueTransformationSequence": {
        "RescaleIntercept": "RescaleIntercept",
        "RescaleSlope": "RescaleSlope",
        "RescaleType": "RescaleType",
    },
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    # Of a Legacy Converted Enhanced CT: what its single-frame originals said and no other group holds.
    "UnassignedSharedConvertedAttributesSequence": {"ConvolutionKernel": "ConvolutionKernel"},
    "UnassignedPerFrameConvertedAttributesSequence": {"ConvolutionKernel": "ConvolutionKernel"},
}

PIXEL_DATA = Tag("PixelData")
OFFSET_TABLE = ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")
FOR_DECODING = ("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit")
WHOLE_FILE = {SHARED, PER_FRAME, "NumberOfFrames", "PixelData", *OFFSET_TABLE}  # what no single frame has
FILES = 2  # whose headers a process keeps: one is being read, another may be looked at


class BadFrames(Exception):
    """The file's functional groups do not describe its frames; the message says what was found."""


def is_multiframe(header: Dataset) -> bool:
    """Whether the file is addressed frame by frame: one of the multi-frame classes, or several frames of any class."""
    return header.get("SOPClassUID") in MULTIFRAME_CLASSES or frame_count(header) > 1


def frame_count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames") or 1)


def frame_headers(header: FileDataset) -> Iterator[FileDataset]:
    """The header of every frame, in their order, as if each were a file. Raises BadFrames.

    A frame's own functional group stands before the shared one (PS3.3 C.7.6.16.1.1).
    """
    shared, own = header.get(SHARED) or [Dataset()], header.get(PER_FRAME) or []
    if len(own) != frame_count(header):
        raise BadFrames(f"{len(own)} per-frame functional groups for {frame_count(header)} frames")
    common: dict[BaseTag, DataElement | RawDataElement] = {
        each.tag: each for each in header if each.keyword not in WHOLE_FILE
    }
    common |= _said(shared[0])
    for number, groups in enumerate(own, start=1):
        single = [_element("SOPClassUID", uid.CTImageStorage), _element("InstanceNumber", number)]
        elements = common | _said(groups) | {each.tag: each for each in single}
        yield FileDataset("", elements, file_meta=header.file_meta)


def frame_with_pixels(path: Path, number: int) -> FileDataset:
    """Frame `number`, from 1, with its pixels still encoded. No other frame's pixels are read.

    Raises NotDicom, BadFrames, or IndexError where the file ends before the frame.
    """
    status = path.stat()
    file = _opened(path, status.st_mtime_ns, status.st_size)
    if not 1 <= number <= len(file.frames):
        raise IndexError(f"no frame {number}, expected 1 to {len(file.frames)}")
    found = file.frames[number - 1]
    frame = FileDataset("", {each.tag: each for each in found}, file_meta=found.file_meta)
    with file.pixels(path) as pixels:
        if file.encapsulated:
            encoded = get_frame(pixels, number - 1, extended_offsets=file.offsets, number_of_frames=len(file.frames))
            content = encapsulate([encoded])
        else:
            length = int(frame.Rows) * int(frame.Columns) * int(frame.BitsAllocated) // 8
            pixels.seek(length * (number - 1), os.SEEK_CUR)
            content = pixels.read(length)
            if len(content) < length:
                raise IndexError(f"the file ends within frame {number}")
    frame[PIXEL_DATA] = DataElement(PIXEL_DATA, "OB" if file.encapsulated else "OW", content)
    frame[PIXEL_DATA].is_undefined_length = file.encapsulated
    return frame


@dataclass(frozen=True)
class _File:
    frames: list[FileDataset]
    start: int  # of the pixel data's value, in bytes
    encapsulated: bool
    offsets: tuple[bytes, bytes] | None  # the extended offset table (PS3.3 C.7.6.3.1.8)
    inflated: bytes | None  # the pixel data of a deflated file, which can only be read whole

    @contextmanager
    def pixels(self, path: Path) -> Iterator[BinaryIO]:
        """The pixel data's value, at its first byte."""
        with io.BytesIO(self.inflated) if self.inflated is not None else path.open("rb") as file:
            file.seek(self.start)
            yield file


@lru_cache(FILES)
def _opened(path: Path, changed_ns: int, size: int) -> _File:
    """A file's headers are parsed once for all of its frames."""
    with path.open("rb") as file:
        header = header_of(file, also=[*FOR_DECODING, *OFFSET_TABLE])
        implicit, _ = header.original_encoding
        # Tag and length, and between them a VR and two reserved bytes where it is explicit (PS3.5 7.1).
        start = file.tell() + (8 if implicit else 12)
    frames = [*frame_headers(header)]
    syntax = header.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        return _File(frames, 0, False, None, bytes(read_whole(path).get("PixelData", b"")))
    table = [header.get(keyword) for keyword in OFFSET_TABLE]
    return _File(frames, start, syntax.is_encapsulated, (table[0], table[1]) if all(table) else None, None)


def _said(groups: Dataset) -> dict[BaseTag, DataElement | RawDataElement]:
    """What some functional groups say of a frame, as elements of a single-frame header."""
    found: dict[BaseTag, DataElement | RawDataElement] = {}
    for group, names in GROUPS.items():
        items = groups.get(group)
        if not items:
            continue
        for name, single in names.items():
            if name in items[0]:
                element = _element(single, items[0][name].value)
                found[element.tag] = element
    return found


def _element(keyword: str, value: object) -> DataElement:
    tag = tag_for_keyword(keyword)
    assert tag is not None  # a name from the table above
    return DataElement(tag, dictionary_VR(tag), value)
