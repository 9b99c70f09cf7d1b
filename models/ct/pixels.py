"""One frame of a DICOM file as bytes: as it is stored, or decoded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import SEEK_CUR, BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataelem import DataElement, RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, get_frame

from models.ct.decode import stored_values
from models.ct.errors import UndecodableSlice

# What describes a frame's stored values (PS3.3 C.7.6.3).
DESCRIBED = [
    "BitsAllocated",
    "BitsStored",
    "Columns",
    "HighBit",
    "PhotometricInterpretation",
    "PixelRepresentation",
    "Rows",
    "SamplesPerPixel",
]
SWAPPED = {"OW": 2, "OL": 4, "OF": 4, "OD": 8, "OV": 8}  # bytes of a word

Answer = TypeVar("Answer")


def syntax_of(dataset: FileDataset) -> uid.UID:
    """The file's transfer syntax; without one, DICOM's default (PS3.5 10.1)."""
    return uid.UID(dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian))


def frame_count(dataset: Dataset) -> int:
    try:
        return int(dataset.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        return 1


def stored_frame(dataset: FileDataset, index: int) -> bytes:
    """The frame's bytes as the file has them, little endian where it is not compressed. Raises UndecodableSlice."""
    return _told(_stored, dataset, index)


def decoded_frame(dataset: FileDataset, index: int) -> bytes:
    """The frame's stored values, not compressed, little endian. Raises UndecodableSlice."""
    if syntax_of(dataset).is_encapsulated:
        return _told(lambda *frame: _little(_array(*frame)), dataset, index)
    return stored_frame(dataset, index)


def decompressed(dataset: FileDataset) -> FileDataset:
    """The same object in explicit VR little endian. Raises UndecodableSlice."""
    return _told(_decompressed, dataset)


def _told(made: Callable[..., Answer], dataset: FileDataset, *index: int) -> Answer:
    try:
        return made(dataset, *index)
    except UndecodableSlice:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # as in models/ct/decode.py
        raise UndecodableSlice(f"{type(error).__name__} while decoding") from error


@contextmanager
def _pixels(dataset: FileDataset) -> Iterator[BinaryIO]:
    """PixelData's value as a file; in the file itself where it was not read yet, so that one frame costs one frame."""
    raw = dataset.get_item("PixelData", keep_deferred=True)
    if isinstance(raw, RawDataElement) and raw.value is None and raw.length:
        with Path(str(dataset.filename)).open("rb") as file:
            file.seek(raw.value_tell)
            yield file
    else:
        yield BytesIO(dataset.PixelData)


def _stored(dataset: FileDataset, index: int) -> bytes:
    syntax = syntax_of(dataset)
    with _pixels(dataset) as pixels:
        if syntax.is_encapsulated:
            offsets = dataset.get("ExtendedOffsetTable"), dataset.get("ExtendedOffsetTableLengths")
            extended = offsets if all(offsets) else None
            return get_frame(pixels, index, number_of_frames=frame_count(dataset), extended_offsets=extended)
        size = dataset.Rows * dataset.Columns * dataset.get("SamplesPerPixel", 1) * dataset.BitsAllocated // 8
        pixels.seek(index * size, SEEK_CUR)
        frame = pixels.read(size)
    if len(frame) < size:
        raise UndecodableSlice(f"{len(frame)} bytes of pixels, expected {size}")
    return frame if syntax.is_little_endian else _swapped(frame, dataset.BitsAllocated // 8)


def _array(dataset: FileDataset, index: int) -> NDArray[Any]:
    """(rows, columns) stored values of a compressed frame."""
    single = FileDataset("", Dataset(), file_meta=dataset.file_meta)
    for keyword in DESCRIBED:
        if keyword in dataset:
            single[keyword] = dataset[keyword]
    single.add_new("PixelData", "OB", encapsulate([_stored(dataset, index)]))
    single["PixelData"].is_undefined_length = True
    return stored_values(single)


def _decompressed(dataset: FileDataset) -> FileDataset:
    syntax = syntax_of(dataset)
    if syntax.is_encapsulated:
        frames = [decoded_frame(dataset, index) for index in range(frame_count(dataset))]
        dataset.add_new("PixelData", "OW", b"".join(frames))
        dataset["PixelData"].is_undefined_length = False
        for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
            dataset.pop(keyword, None)
    elif not syntax.is_little_endian:
        dataset.walk(_swap)
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    return dataset


def _swap(_: Dataset, element: DataElement) -> None:
    """pydicom turns numbers round when it writes another byte order, and leaves words alone."""
    if element.VR in SWAPPED and element.value:
        element.value = _swapped(element.value, SWAPPED[element.VR])


def _swapped(words: bytes, size: int) -> bytes:
    return np.frombuffer(words, f">u{size}").astype(f"<u{size}").tobytes()


def _little(pixels: NDArray[Any]) -> bytes:
    return np.ascontiguousarray(pixels, pixels.dtype.newbyteorder("<")).tobytes()
