"""Pixels of one DICOM file as Hounsfield units."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder

from models.ct.errors import UndecodableSlice
from models.ct.frames import frame_shape
from models.ct.header import NotDicom
from models.ct.multiframe import frame_with_pixels

NATIVE = "pydicom"

# Retired JPEG processes that GDCM reads as it reads the sequential ones.
JPEG_SPECTRAL_SELECTION, JPEG_FULL_PROGRESSION = uid.UID("1.2.840.10008.1.2.4.53"), uid.UID("1.2.840.10008.1.2.4.55")
JPEG_12_BITS = (uid.JPEGExtended12Bit, JPEG_SPECTRAL_SELECTION, JPEG_FULL_PROGRESSION)

# Which plugin decodes which transfer syntax: the fastest of those with a licence that is not GPL (docs/decisions/0003).
DECODERS: dict[str, str] = {
    uid.ImplicitVRLittleEndian: NATIVE,
    uid.ExplicitVRLittleEndian: NATIVE,
    uid.ExplicitVRBigEndian: NATIVE,
    uid.DeflatedExplicitVRLittleEndian: NATIVE,
    uid.RLELossless: "pylibjpeg",
    uid.JPEGBaseline8Bit: "gdcm",
    **dict.fromkeys(JPEG_12_BITS, "gdcm"),
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}

END_OF_IMAGE = b"\xff\xd9"  # ITU-T T.87 C.1.1

BITS = (8, 16, 32)  # allocated, of CT

# Larger than any scanner writes; a few header bytes must not be able to ask for gigabytes.
MAX_PIXELS = 4096 * 4096

AIR_HU = -1000.0


def read_hu(path: Path, frame: int | None = None) -> NDArray[np.float32]:
    """The slice's (rows, columns) in HU: stored value times slope plus intercept (PS3.3 C.11.1.1.2).

    `frame`, from 1, of a multi-frame file; no other frame is read. Raises UndecodableSlice where the file has no
    pixels, or its decoder cannot read them.
    """
    try:
        if frame is not None:
            return decoded_hu(frame_with_pixels(path, frame))
        # A disk that fails is no fault of the slice, and may be over in a moment.
        content = io.BytesIO(path.read_bytes())
        dataset = pydicom.dcmread(content, force=True)
    except (OSError, UndecodableSlice):
        raise
    except NotDicom as error:
        raise UndecodableSlice(str(error)) from error
    except Exception as error:  # arbitrary bytes make pydicom raise anything
        raise UndecodableSlice(f"{type(error).__name__} while reading") from error
    return decoded_hu(dataset)


def decoded_hu(dataset: FileDataset) -> NDArray[np.float32]:
    """The same of a file that was read already."""
    try:
        return _hu(dataset)
    except UndecodableSlice:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # decoders raise whatever their library reports; Rust's panics are no Exception
        raise UndecodableSlice(f"{type(error).__name__} while decoding") from error


def stored_values(dataset: FileDataset) -> NDArray[np.integer[Any]]:
    """(rows, columns) of a dataset with one frame, decoded but not rescaled. Raises UndecodableSlice, or anything."""
    syntax = dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    if "PixelData" not in dataset:
        raise UndecodableSlice("no PixelData, expected a CT slice")
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise UndecodableSlice(f"{dataset.Rows} x {dataset.Columns} pixels, expected at most {MAX_PIXELS}")
    if (decoder := DECODERS.get(syntax)) is None:
        raise UndecodableSlice(f"no decoder for transfer syntax {syntax}")
    allocated = dataset.BitsAllocated
    if allocated not in BITS or not 0 < (dataset.get("BitsStored") or allocated) <= allocated:
        # GDCM would take the whole process down over others.
        raise UndecodableSlice(f"{dataset.get('BitsStored')} of {allocated} bits, expected 1 to 8, 16 or 32")
    if decoder != NATIVE and syntax != uid.RLELossless:
        _check_frame(dataset)
    if decoder == "pyjpegls" and not _frame(dataset).rstrip(b"\0").endswith(END_OF_IMAGE):
        # Its decoder would go on for seconds over a frame that was cut off.
        raise UndecodableSlice("the JPEG-LS frame ends before its end marker")
    pixels = _stored(dataset, syntax, decoder)
    if pixels.shape != (dataset.Rows, dataset.Columns):
        raise UndecodableSlice(f"decoded to {pixels.shape}, expected ({dataset.Rows}, {dataset.Columns})")
    return pixels


def _hu(dataset: FileDataset) -> NDArray[np.float32]:
    pixels = stored_values(dataset)
    hu = pixels.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        slope = np.float32(dataset.get("RescaleSlope", 1.0) or 1.0)
        intercept = np.float32(dataset.get("RescaleIntercept", 0.0) or 0.0)
        hu *= slope
        hu += intercept
    if not np.isfinite(hu.min() + hu.max()):
        raise UndecodableSlice("RescaleSlope or RescaleIntercept makes HU that are not finite")
    if padding := _padding(dataset):
        low, high = padding
        if max(low * float(slope), high * float(slope)) + intercept > AIR_HU:
            np.minimum(hu, AIR_HU, out=hu, where=(pixels >= low) & (pixels <= high))
    return hu


def _check_frame(dataset: FileDataset) -> None:
    """A few bytes of a frame must not be able to ask for gigabytes either: decoders believe its own header."""
    expected, found = (dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1)), frame_shape(_frame(dataset))
    if found != expected:
        raise UndecodableSlice(f"the frame says (rows, columns, samples) are {found}, expected {expected}")


def _stored(dataset: FileDataset, syntax: str, decoder: str) -> NDArray[np.integer[Any]]:
    """The stored values (PS3.5 8.1.1), without what lies beside their bits: old overlays, or a scanner's own."""
    if syntax in JPEG_12_BITS:
        return _jpeg_of_any_precision(dataset)
    allocated, stored = int(dataset.BitsAllocated), int(dataset.get("BitsStored") or dataset.BitsAllocated)
    high = int(dataset.get("HighBit", stored - 1))
    raised = decoder == NATIVE or syntax == uid.RLELossless
    if not (raised and stored - 1 < high < allocated):
        # Not dataset.pixel_array, which keeps a copy and takes six times as long for uncompressed pixels.
        return _decoded(dataset, syntax, decoder)
    # Values that end above the lowest bit, as the standard allowed before 2004; pydicom does not look at HighBit.
    pixels = _decoded(dataset, syntax, decoder, correct_unused_bits=False)
    return (pixels << (allocated - 1 - high)) >> (allocated - stored)


def _decoded(dataset: FileDataset, syntax: str, decoder: str, **options: Any) -> NDArray[np.integer[Any]]:
    plugin = "" if decoder == NATIVE else decoder
    return get_decoder(syntax).as_array(dataset, decoding_plugin=plugin, **options)[0]


def _jpeg_of_any_precision(dataset: FileDataset) -> NDArray[np.integer[Any]]:
    """A lossy JPEG frame of 8 or 12 bits. GDCM reads each process alike, but pydicom asks it for the baseline only."""
    options: dict[str, Any] = {
        "rows": dataset.Rows,
        "columns": dataset.Columns,
        "number_of_frames": 1,
        "samples_per_pixel": 1,
        "photometric_interpretation": "MONOCHROME2",
        "bits_allocated": dataset.BitsAllocated,
        "bits_stored": dataset.BitsStored,
        "pixel_representation": dataset.PixelRepresentation,
        "pixel_keyword": "PixelData",
    }
    return get_decoder(uid.JPEGBaseline8Bit).as_array(dataset.PixelData, decoding_plugin="gdcm", **options)[0]


def _padding(dataset: FileDataset) -> tuple[int, int] | None:
    """The lowest and highest stored value that is padding and no measurement (PS3.3 C.7.5.1.1.2)."""
    try:
        first = int(dataset.PixelPaddingValue)
        limit = int(dataset.get("PixelPaddingRangeLimit", first))
    except (AttributeError, TypeError, ValueError):  # there is none, or it is no number
        return None
    signed, span = dataset.PixelRepresentation == 1, 2 ** int(dataset.BitsAllocated)
    # Scanners write the VR of the other sign: 63536 for -2000.
    first, limit = ((value + span // 2 * signed) % span - span // 2 * signed for value in (first, limit))
    return min(first, limit), max(first, limit)


def _frame(dataset: FileDataset) -> bytes:
    """The one encapsulated frame (PS3.5 A.4)."""
    return next(generate_frames(dataset.PixelData, number_of_frames=1))
