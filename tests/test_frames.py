import struct

import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames
from synthetic import random_hu, write_slice

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.frames import JPEG_2000, frame_shape

COMPRESSED = [
    "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90",
    "JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91",
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80",
    "JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81",
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70",
    "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57",
    "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50",
    "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51",
    "JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55",
]


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_real_frame_says_the_size_that_its_header_says(data, name):
    dataset = pydicom.dcmread(data / "oddities" / "cornerstone" / f"CTImage.dcm_{name}.dcm")

    assert frame_shape(next(generate_frames(dataset.PixelData, number_of_frames=1))) == (512, 512, 1)


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.JPEGLSLossless])
def test_a_frame_cannot_ask_for_gigabytes(tmp_path, syntax):
    path = write_slice(tmp_path, hu=random_hu(slices=1, size=64)[0])
    dataset = pydicom.dcmread(path)
    dataset.compress(syntax, generate_instance_uid=False)
    frame = bytearray(next(generate_frames(dataset.PixelData, number_of_frames=1)))
    place, form = (8, ">LL") if frame.startswith(JPEG_2000) else (frame.index(b"\xff\xf7") + 5, ">HH")
    struct.pack_into(form, frame, place, 60_000, 60_000)
    dataset.PixelData = encapsulate([bytes(frame)])
    dataset.save_as(path)

    with pytest.raises(UndecodableSlice, match=r"says \(rows, columns, samples\) are \(60000, 60000, 1\)"):
        read_hu(path)


@pytest.mark.parametrize(
    "frame", [b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\0\x0b\x08\0", JPEG_2000, b"GIF89a"]
)
def test_a_frame_without_a_whole_header_says_nothing(frame):
    assert frame_shape(frame) is None


def test_the_size_of_a_thumbnail_is_not_the_frames(tmp_path):
    inner = b"\xff\xd8\xff\xc0\0\x0b\x08" + struct.pack(">HHB", 8, 8, 3)
    outer = b"\xff\xc0\0\x0b\x08" + struct.pack(">HHB", 512, 256, 1)
    application = b"\xff\xe0" + struct.pack(">H", len(inner) + 2) + inner

    assert frame_shape(b"\xff\xd8" + application + b"\xff\xff" + outer[1:]) == (512, 256, 1)
