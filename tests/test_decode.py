import time

import cv2
import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.encaps import encapsulate, generate_frames
from synthetic import random_hu, write_slice

from models.ct.decode import MAX_PIXELS, decoded_hu, read_hu
from models.ct.errors import UndecodableSlice

RLE = "RLELosslessTransferSyntax_1.2.840.10008.1.2.5"
COMPRESSED = [uid.RLELossless, uid.JPEGLSLossless, uid.JPEG2000Lossless]


def by_name(syntax):
    return syntax.name.split(",")[0] if isinstance(syntax, uid.UID) else None


def storing(stored, slope=None, intercept=None, dtype="<u2"):
    """A change of a slice to these stored values and this rescale."""

    def change(dataset):
        pixels = np.array(stored, dtype=dtype)
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.PixelData = pixels.tobytes()
        dataset.PixelRepresentation = int(np.issubdtype(dtype, np.signedinteger))
        for keyword, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (1, -1024, [[-1024, -1023], [-1022, 976]]),
        (2, -10, [[-10, -8], [-6, 3990]]),
        (0.5, 3, [[3, 3.5], [4, 1003]]),
        (-1, 0, [[0, -1], [-2, -2000]]),
        (None, None, [[0, 1], [2, 2000]]),
        (None, -1024, [[-1024, -1023], [-1022, 976]]),
        (2, None, [[0, 2], [4, 4000]]),
    ],
)
def test_hu_is_the_stored_value_times_slope_plus_intercept_once(tmp_path, slope, intercept, expected):
    hu = read_hu(write_slice(tmp_path, storing([[0, 1], [2, 2000]], slope, intercept)))

    assert hu.dtype == np.float32
    assert hu.tolist() == expected


def test_signed_stored_values_stay_signed(tmp_path):
    path = write_slice(tmp_path, storing([[-2000, -1], [0, 1500]], 1, -1024, dtype="<i2"))

    assert read_hu(path).tolist() == [[-3024, -1025], [-1024, 476]]


def test_twelve_bit_values_are_read_without_what_lies_in_the_upper_bits(tmp_path):
    def change(dataset):
        storing([[0x1000, 0xF001], [0x0FFF, 0x0800]], 1, 0)(dataset)
        dataset.BitsStored, dataset.HighBit = 12, 11

    assert read_hu(write_slice(tmp_path, change)).tolist() == [[0, 1], [4095, 2048]]


@pytest.mark.parametrize("syntax", COMPRESSED, ids=by_name)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_lossless_compression_changes_no_bit(tmp_path, syntax, signed):
    stored = random_hu(slices=1)[0] - (0 if signed else -1024)
    change = storing(stored, 1, -24, dtype="<i2" if signed else "<u2")

    def compressed(dataset):
        change(dataset)
        dataset.compress(syntax, generate_instance_uid=False)

    twin, path = write_slice(tmp_path / "plain", change), write_slice(tmp_path / "compressed", compressed)

    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    assert read_hu(twin).tolist() == (stored - 24).tolist()
    assert read_hu(path).tolist() == read_hu(twin).tolist()


def test_a_slice_without_pixels_is_undecodable(tmp_path):
    with pytest.raises(UndecodableSlice, match="no PixelData"):
        read_hu(write_slice(tmp_path, lambda dataset: delattr(dataset, "PixelData")))


def test_truncated_pixels_are_undecodable(tmp_path):
    def change(dataset):
        dataset.PixelData = dataset.PixelData[:-2]

    with pytest.raises(UndecodableSlice):
        read_hu(write_slice(tmp_path, change))


def cutting(syntax, length):
    """A change of a slice to a compressed frame of which only the first bytes are left."""

    def change(dataset):
        dataset.compress(syntax, generate_instance_uid=False)
        frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
        assert length < len(frame)
        dataset.PixelData = encapsulate([frame[:length]])
        dataset["PixelData"].is_undefined_length = True

    return change


@pytest.mark.parametrize("syntax", COMPRESSED, ids=by_name)
@pytest.mark.parametrize("length", [400, 1200])
def test_a_truncated_compressed_frame_is_undecodable(tmp_path, syntax, length):
    with pytest.raises(UndecodableSlice):
        read_hu(write_slice(tmp_path, cutting(syntax, length)))


def test_a_truncated_jpeg_ls_frame_does_not_keep_the_processor_busy(tmp_path):
    # CharLS spins for 2**32 steps on a stream cut here and padded with a zero to an even length
    path = write_slice(tmp_path, cutting(uid.JPEGLSLossless, 501))

    start = time.process_time()
    with pytest.raises(UndecodableSlice):
        read_hu(path)
    assert time.process_time() - start < 2  # seconds


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, *COMPRESSED], ids=by_name)
def test_a_file_cut_short_is_undecodable(tmp_path, syntax):
    def change(dataset):
        if syntax.is_compressed:
            dataset.compress(syntax, generate_instance_uid=False)

    path = write_slice(tmp_path, change)
    path.write_bytes(path.read_bytes()[:-400])

    with pytest.raises(UndecodableSlice):
        read_hu(path)


def test_a_header_cannot_ask_for_gigabytes(tmp_path):
    def change(dataset):
        dataset.Rows = dataset.Columns = 65535

    with pytest.raises(UndecodableSlice, match=f"expected at most {MAX_PIXELS}"):
        read_hu(write_slice(tmp_path, change))


def test_a_decoder_that_panics_makes_the_slice_undecodable(data):
    dataset = pydicom.dcmread(data / "oddities" / "cornerstone" / f"CTImage.dcm_{RLE}.dcm")
    dataset.Columns = 64  # the frame has more, and the Rust of pylibjpeg-rle runs out of its buffer

    with pytest.raises(UndecodableSlice, match="PanicException"):
        decoded_hu(dataset)


def test_several_frames_are_no_slice(tmp_path):
    def change(dataset):
        dataset.NumberOfFrames = 2
        dataset.PixelData += dataset.PixelData

    with pytest.raises(UndecodableSlice, match="decoded to"):
        read_hu(write_slice(tmp_path, change))


def test_a_file_that_cannot_be_opened_is_not_called_undecodable(tmp_path):
    # a worker tries again after an OSError; an undecodable slice is left out of its series for good
    with pytest.raises(OSError, match="missing"):
        read_hu(tmp_path / "missing.dcm")


LOSSLESS = {
    "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2": uid.ExplicitVRBigEndian,
    "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99": uid.DeflatedExplicitVRLittleEndian,
    "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90": uid.JPEG2000Lossless,
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80": uid.JPEGLSLossless,
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70": uid.JPEGLosslessSV1,
    "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57": uid.JPEGLossless,
    "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1": uid.ExplicitVRLittleEndian,
    "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2": uid.ImplicitVRLittleEndian,
    RLE: uid.RLELossless,
}


def cornerstone(data, name=""):
    return data / "oddities" / "cornerstone" / (f"CTImage.dcm_{name}.dcm" if name else "CTImage.dcm")


def test_the_plain_real_slice_is_its_bytes_times_slope_plus_intercept(data):
    dataset = pydicom.dcmread(cornerstone(data))
    stored = np.frombuffer(dataset.PixelData, dtype="<i2").reshape(512, 512).astype(np.float32)

    assert (dataset.RescaleSlope, dataset.RescaleIntercept) == (1, -1024)
    np.testing.assert_array_equal(read_hu(cornerstone(data)), stored - 1024)


@pytest.mark.parametrize("name", LOSSLESS, ids=lambda name: name.split("TransferSyntax")[0])
def test_every_lossless_syntax_of_a_real_slice_gives_the_same_hu(data, name):
    path = cornerstone(data, name)

    assert pydicom.dcmread(path, stop_before_pixels=True).file_meta.TransferSyntaxUID == LOSSLESS[name]
    np.testing.assert_array_equal(read_hu(path), read_hu(cornerstone(data)))


@pytest.mark.parametrize(
    ("name", "largest", "mean"),  # HU
    [
        ("JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81", 1, 0.7),
        ("JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91", 5, 0.6),
        # 8 bits hold the range in steps of 32 HU
        ("JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50", 560, 32.2),
    ],
)
def test_a_lossy_real_slice_stays_within_its_tolerance(data, name, largest, mean):
    difference = np.abs(read_hu(cornerstone(data, name)) - read_hu(cornerstone(data)))

    assert 0 < difference.max() <= largest
    assert difference.mean() <= mean


def test_baseline_jpeg_is_what_another_decoder_reads(data):
    path = cornerstone(data, "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50")
    dataset = pydicom.dcmread(path)
    frame = next(generate_frames(dataset.PixelData, number_of_frames=1))
    stored = cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_UNCHANGED)

    expected = stored * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    np.testing.assert_allclose(read_hu(path), expected, atol=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51",
        "JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53",
        "JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55",
    ],
)
def test_a_syntax_that_no_decoder_reads_is_undecodable(data, name):
    with pytest.raises(UndecodableSlice):
        read_hu(cornerstone(data, name))


@pytest.mark.parametrize("number", range(73, 93))
def test_real_jpeg_2000_slices_of_a_siemens_scanner_hold_plausible_hu(data, number):
    name = f"CT.1.3.12.2.1107.5.1.4.60064.300000221208081134280000165{number}"
    hu = read_hu(data / "oddities" / "totalseg_ct20" / name)

    assert hu.shape == (512, 512)
    assert hu.min() == -1024  # the air outside the patient
    assert 200 < hu.max() <= 3071  # contrast or bone


def test_a_rescale_that_overflows_makes_the_slice_undecodable(tmp_path):
    path = write_slice(tmp_path, lambda dataset: setattr(dataset, "RescaleSlope", "1e300"))

    with pytest.raises(UndecodableSlice, match="not finite"):
        read_hu(path)
