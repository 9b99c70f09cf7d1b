import shutil
import subprocess
import time

import cv2
import numpy as np
import pydicom
import pytest
from conftest import missing
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


@pytest.mark.parametrize(("allocated", "stored"), [(64, 16), (16, 17), (12, 12)])
def test_bits_that_no_ct_has_are_undecodable_and_take_no_process_down(data, allocated, stored):
    name = "CTImage.dcm_JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57.dcm"
    dataset = pydicom.dcmread(data / "oddities" / "cornerstone" / name)
    dataset.BitsAllocated, dataset.BitsStored = allocated, stored

    with pytest.raises(UndecodableSlice, match="bits, expected 1 to 8, 16 or 32"):
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


TWELVE_BITS = [
    "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51",
    "JPEGProcess6_8TransferSyntax_1.2.840.10008.1.2.4.53",
    "JPEGProcess10_12TransferSyntax_1.2.840.10008.1.2.4.55",
]


@pytest.mark.parametrize("name", TWELVE_BITS)
def test_twelve_bit_jpeg_stays_within_its_tolerance(data, name):
    difference = np.abs(read_hu(cornerstone(data, name)) - read_hu(cornerstone(data)))

    assert 0 < difference.max() <= 90  # HU; one step of what is stored is 2
    assert difference.mean() <= 4


def test_twelve_bit_jpeg_is_what_dcmtk_reads(data, tmp_path):
    if shutil.which("dcmdjpeg") is None:
        missing("dcmdjpeg (Debian dcmtk) is not installed")
    path = cornerstone(data, TWELVE_BITS[0])
    subprocess.run(["dcmdjpeg", path, tmp_path / "plain.dcm"], check=True)

    np.testing.assert_array_equal(read_hu(path), read_hu(tmp_path / "plain.dcm"))


def test_monochrome1_inverts_the_display_and_not_the_hu(tmp_path):
    hu = random_hu(slices=1)[0]
    path = write_slice(tmp_path, lambda dataset: setattr(dataset, "PhotometricInterpretation", "MONOCHROME1"), hu)

    np.testing.assert_array_equal(read_hu(path), hu)


def padded(value, limit=None, syntax=uid.ExplicitVRLittleEndian, signed=True):
    """A change of a slice to stored values of which some are padding, slope 1 and intercept -1000."""

    def change(dataset):
        storing(
            [[-2000, 0], [1500, 3000]] if signed else [[0, 1000], [2500, 4000]], 1, -1000, "<i2" if signed else "<u2"
        )(dataset)
        dataset.PixelPaddingValue = value
        if limit is not None:
            dataset.PixelPaddingRangeLimit = limit
        dataset.file_meta.TransferSyntaxUID = syntax

    return change


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian], ids=by_name)
@pytest.mark.parametrize(
    ("value", "limit", "expected"),
    [
        (3000, None, [[-3000, -1000], [500, -1000]]),  # brighter than air: air
        (-2000, None, [[-3000, -1000], [500, 2000]]),  # below every window: as it is
        (1500, 3000, [[-3000, -1000], [-1000, -1000]]),
        (3000, 1500, [[-3000, -1000], [-1000, -1000]]),
        (-2000, 0, [[-3000, -1000], [500, 2000]]),
        (7, None, [[-3000, -1000], [500, 2000]]),
    ],
)
def test_padding_is_never_brighter_than_air(tmp_path, syntax, value, limit, expected):
    assert read_hu(write_slice(tmp_path, padded(value, limit, syntax))).tolist() == expected


def test_padding_is_found_under_a_negative_slope_too(tmp_path):
    def change(dataset):
        padded(-2000)(dataset)
        dataset.RescaleSlope = -1

    assert read_hu(write_slice(tmp_path, change)).tolist() == [[-1000, -1000], [-2500, -4000]]


def test_unsigned_padding_is_found_too(tmp_path):
    assert read_hu(write_slice(tmp_path, padded(4000, signed=False))).tolist() == [[-1000, 0], [1500, -1000]]


def test_a_padding_value_written_with_the_other_sign_is_the_same_bits(tmp_path):
    path = write_slice(tmp_path, padded(3000))
    content = path.read_bytes()
    # a stored -536 and a padding of 65000, as scanners write -2000 as 63536 beside signed pixels
    content = content.replace(b"\x28\x00\x20\x01SS\x02\x00\xb8\x0b", b"\x28\x00\x20\x01US\x02\x00\xe8\xfd")
    path.write_bytes(content[:-2] + b"\xe8\xfd")  # 65000 and -536 are the same sixteen bits
    changed = pydicom.dcmread(path)
    changed.RescaleIntercept = 2000
    changed.save_as(path)

    assert pydicom.dcmread(path).PixelPaddingValue == 65000
    assert read_hu(path).tolist() == [[0, 2000], [3500, -1000]]


def test_the_padding_of_a_real_ge_slice_stays_below_every_window(lidc_0001):
    dataset = pydicom.dcmread(lidc_0001[0])
    stored = dataset.pixel_array.astype(np.float32)

    assert dataset.PixelPaddingValue == 63536
    np.testing.assert_array_equal(read_hu(lidc_0001[0]), stored - 1024)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless], ids=by_name)
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_values_that_end_above_the_lowest_bit_are_shifted_down(tmp_path, syntax, signed):
    """BitsStored 12 and HighBit 15, as the standard allowed before it asked for HighBit 11 (PS3.5 8.1.1)."""
    values = np.array([[-2000, -1], [0, 1500]] if signed else [[0, 1], [4095, 2000]])

    def change(dataset):
        storing((values << 4) | 0x5, 1, 0, "<i2" if signed else "<u2")(dataset)
        dataset.compress(syntax, generate_instance_uid=False) if syntax.is_compressed else None
        dataset.BitsStored, dataset.HighBit = 12, 15

    assert read_hu(write_slice(tmp_path, change)).tolist() == values.tolist()


def test_an_overlay_in_the_high_bits_is_no_part_of_the_value(tmp_path):
    values = np.array([[0, 100], [2000, 4095]], dtype="<u2")

    def change(dataset):
        storing(values | 0x8000, 1, 0)(dataset)
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.add_new(0x60000010, "US", 2)  # OverlayRows, retired as part of the pixels (PS3.5 8.1.2)
        dataset.add_new(0x60000102, "US", 15)  # OverlayBitPosition

    assert read_hu(write_slice(tmp_path, change)).tolist() == values.tolist()


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
