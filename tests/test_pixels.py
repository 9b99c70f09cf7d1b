"""One frame of a file as it is stored or decoded, and whole files in explicit VR little endian."""

import io
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames
from synthetic import random_hu, write_slice

from models.ct.decode import DECODERS, read_hu
from models.ct.errors import UndecodableSlice
from models.ct.header import read_elements, read_whole
from models.ct.pixels import decoded_frame, decompressed, frame_count, stored_frame, syntax_of

HU = random_hu(slices=3)


def three_frames(dataset):
    dataset.NumberOfFrames = 3
    dataset.PixelData = (HU + 1024).astype("<u2").tobytes()


@pytest.mark.parametrize("read", [read_whole, lambda path: read_elements(path, 1024)], ids=["whole", "deferred"])
def test_each_frame_of_a_native_file_is_its_own_bytes(tmp_path, read):
    dataset = read(write_slice(tmp_path, three_frames))

    assert frame_count(dataset) == 3
    for index in range(3):
        expected = (HU[index] + 1024).astype("<u2").tobytes()
        assert (stored_frame(dataset, index), decoded_frame(dataset, index)) == (expected, expected)


@pytest.mark.parametrize("read", [read_whole, lambda path: read_elements(path, 100)], ids=["whole", "deferred"])
def test_each_frame_of_a_compressed_file_decodes_to_its_own(tmp_path, read):
    def compress(dataset):
        three_frames(dataset)
        dataset.compress(uid.RLELossless, encoding_plugin="pylibjpeg")

    dataset = read(write_slice(tmp_path, compress))

    whole = read_whole(tmp_path / "0000.dcm")
    encoded = list(generate_frames(whole.PixelData, number_of_frames=3))
    for index in range(3):
        assert stored_frame(dataset, index) == encoded[index]
        assert decoded_frame(dataset, index) == (HU[index] + 1024).astype("<u2").tobytes()


def test_one_frame_of_many_is_read_alone(tmp_path):
    dataset = read_elements(write_slice(tmp_path, three_frames), 1024)

    stored_frame(dataset, 2)

    assert dataset.get_item("PixelData", keep_deferred=True).value is None


def test_what_cannot_be_decoded_says_so(tmp_path):
    short = read_whole(write_slice(tmp_path, lambda dataset: setattr(dataset, "PixelData", dataset.PixelData[:100])))
    with pytest.raises(UndecodableSlice, match="100 bytes of pixels, expected 2048"):
        stored_frame(short, 0)

    def video(dataset):
        dataset.PixelData = encapsulate([b"no picture"])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML

    with pytest.raises(UndecodableSlice, match="no decoder"):
        decompressed(read_whole(write_slice(tmp_path, video)))


def oddities(data: Path) -> list[Path]:
    return sorted((data / "oddities" / "cornerstone").glob("*.dcm"))


def test_every_syntax_becomes_explicit_little_endian_and_stays_the_same_picture(data):
    seen = set()
    for path in oddities(data):
        dataset = read_whole(path)
        syntax = syntax_of(dataset)
        if syntax not in DECODERS or frame_count(dataset) > 1 or dataset.get("SamplesPerPixel") != 1:
            continue
        try:
            expected = read_hu(path)
        except UndecodableSlice:
            continue
        content = io.BytesIO()
        pydicom.dcmwrite(content, decompressed(dataset), enforce_file_format=True)
        again = pydicom.dcmread(io.BytesIO(content.getvalue()))
        assert again.file_meta.TransferSyntaxUID == uid.ExplicitVRLittleEndian
        hu = again.pixel_array.astype(np.float32) * float(again.RescaleSlope) + float(again.RescaleIntercept)
        assert np.array_equal(hu, expected), path.name
        assert again.SOPInstanceUID == dataset.SOPInstanceUID
        seen.add(syntax)
    assert {uid.ExplicitVRBigEndian, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.RLELossless} <= seen
