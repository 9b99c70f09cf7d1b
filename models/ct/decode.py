"""Pixels of one DICOM file as Hounsfield units."""

import io
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import uid
from pydicom.dataset import FileDataset
from pydicom.encaps import generate_frames
from pydicom.pixels.decoders.base import get_decoder

from models.ct.errors import UndecodableSlice
from models.ct.frames import frame_shape

NATIVE = "pydicom"

# Which plugin decodes which transfer syntax: the fastest of those with a licence that is not GPL (docs/decisions/0003).
DECODERS: dict[str, str] = {
    uid.ImplicitVRLittleEndian: NATIVE,
    uid.ExplicitVRLittleEndian: NATIVE,
    uid.ExplicitVRBigEndian: NATIVE,
    uid.DeflatedExplicitVRLittleEndian: NATIVE,
    uid.RLELossless: "pylibjpeg",
    uid.JPEGBaseline8Bit: "gdcm",
    uid.JPEGExtended12Bit: "gdcm",
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

# Larger than any scanner writes; a few header bytes must not be able to ask for gigabytes.
MAX_PIXELS = 4096 * 4096


def read_hu(path: Path) -> NDArray[np.float32]:
    """The slice's (rows, columns) in HU: stored value times slope plus intercept (PS3.3 C.11.1.1.2).

    Raises UndecodableSlice where the file has no pixels, or its decoder cannot read them.
    """
    content = io.BytesIO(path.read_bytes())  # a disk that fails is no fault of the slice, and may be over in a moment
    try:
        dataset = pydicom.dcmread(content, force=True)
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


def _hu(dataset: FileDataset) -> NDArray[np.float32]:
    syntax = dataset.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    if "PixelData" not in dataset:
        raise UndecodableSlice("no PixelData, expected a CT slice")
    if dataset.Rows * dataset.Columns > MAX_PIXELS:
        raise UndecodableSlice(f"{dataset.Rows} x {dataset.Columns} pixels, expected at most {MAX_PIXELS}")
    if (decoder := DECODERS.get(syntax)) is None:
        raise UndecodableSlice(f"no decoder for transfer syntax {syntax}")
    if decoder != NATIVE and syntax != uid.RLELossless:
        _check_frame(dataset)
    if decoder == "pyjpegls" and not _frame(dataset).rstrip(b"\0").endswith(END_OF_IMAGE):
        # Its decoder would go on for seconds over a frame that was cut off.
        raise UndecodableSlice("the JPEG-LS frame ends before its end marker")
    # Not dataset.pixel_array, which keeps a copy and takes six times as long for uncompressed pixels.
    pixels, _ = get_decoder(syntax).as_array(dataset, decoding_plugin="" if decoder == NATIVE else decoder)
    if pixels.shape != (dataset.Rows, dataset.Columns):
        raise UndecodableSlice(f"decoded to {pixels.shape}, expected ({dataset.Rows}, {dataset.Columns})")
    hu = pixels.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        hu *= np.float32(dataset.get("RescaleSlope", 1.0) or 1.0)
        hu += np.float32(dataset.get("RescaleIntercept", 0.0) or 0.0)
    if not np.isfinite(hu.min() + hu.max()):
        raise UndecodableSlice("RescaleSlope or RescaleIntercept makes HU that are not finite")
    return hu


def _check_frame(dataset: FileDataset) -> None:
    """A few bytes of a frame must not be able to ask for gigabytes either: decoders believe its own header."""
    expected, found = (dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1)), frame_shape(_frame(dataset))
    if found != expected:
        raise UndecodableSlice(f"the frame says (rows, columns, samples) are {found}, expected {expected}")


def _frame(dataset: FileDataset) -> bytes:
    """The one encapsulated frame (PS3.5 A.4)."""
    return next(generate_frames(dataset.PixelData, number_of_frames=1))
