import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataset import FileDataset
from pydicom.encaps import encapsulate
from synthetic import IDENTITY, write_slice

from models.ct.header import OPTIONAL, read_header, read_whole
from models.ct.reasons import Reason
from models.ct.screening import SetAside, screened_header, slice_normal, tilt_degrees
from models.ct.series import slice_of


def outcome(path: Path) -> Reason | str:
    found = screened_header(path)
    return found.reason if isinstance(found, SetAside) else "usable"


def setting(**elements):
    def change(dataset: FileDataset) -> None:
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)

    return change


def without(*keywords):
    def change(dataset: FileDataset) -> None:
        for keyword in keywords:
            delattr(dataset, keyword)

    return change


def with_unknown_vr(path: Path, keyword: str) -> Path:
    """The element gets a VR that no standard knows, so that pydicom cannot convert its value."""
    tag = tag_for_keyword(keyword)
    start = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + dictionary_VR(tag).encode()
    content = path.read_bytes()
    assert content.count(start) == 1
    path.write_bytes(content.replace(start, start[:4] + b"ZZ"))
    return path


def all_optional(dataset: FileDataset) -> None:
    dataset.AcquisitionNumber = dataset.InstanceNumber = 1
    dataset.ConvolutionKernel, dataset.LossyImageCompression, dataset.PixelSpacing = "B30f", "00", [1, 1]
    dataset.SliceLocation, dataset.DerivationDescription = 12.5, "resampled"


def test_a_plain_axial_slice_is_usable(tmp_path):
    header = screened_header(write_slice(tmp_path))

    assert isinstance(header, FileDataset)
    assert (header.SeriesInstanceUID, header.Rows, header.Columns) == (IDENTITY.series_uid, 32, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (setting(Modality="MR"), Reason.NOT_CT),
        (setting(Modality="PT"), Reason.NOT_CT),
        (without("Modality"), Reason.NOT_CT),
        (setting(SeriesInstanceUID="1.2..3"), Reason.INVALID_UID),
        (setting(SeriesInstanceUID="../x"), Reason.INVALID_UID),
        (setting(SeriesInstanceUID="1.2/../../3"), Reason.INVALID_UID),
        (setting(SeriesInstanceUID="1." * 32 + "1"), Reason.INVALID_UID),  # 65 characters
        (setting(SeriesInstanceUID=""), Reason.INVALID_UID),
        (setting(SOPInstanceUID="1.2.x"), Reason.INVALID_UID),
        (setting(StudyInstanceUID="../../etc"), Reason.INVALID_UID),
        (without("StudyInstanceUID"), Reason.INVALID_UID),
        (setting(SOPClassUID=uid.EnhancedCTImageStorage), Reason.MULTIFRAME),
        (setting(SOPClassUID=uid.LegacyConvertedEnhancedCTImageStorage), Reason.MULTIFRAME),
        (setting(NumberOfFrames=2), Reason.MULTIFRAME),
        (setting(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), Reason.LOCALIZER),
        (setting(ImageType=["ORIGINAL", "PRIMARY", "scout view"]), Reason.LOCALIZER),
        (setting(ImageType="LOCALIZER"), Reason.LOCALIZER),
        (setting(SOPClassUID=uid.SecondaryCaptureImageStorage), Reason.SECONDARY_CAPTURE),
        (setting(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), Reason.SECONDARY_CAPTURE),
        (without("PixelData"), Reason.NO_PIXELS),
        (without("Rows"), Reason.NO_PIXELS),
        (setting(Columns=0), Reason.NO_PIXELS),
        (setting(SamplesPerPixel=3, PhotometricInterpretation="RGB"), Reason.NOT_GRAYSCALE),
        (setting(PhotometricInterpretation="PALETTE COLOR"), Reason.NOT_GRAYSCALE),
        (setting(Modality="SEG", SOPClassUID=uid.SegmentationStorage), Reason.NOT_CT),
        (setting(Modality="SR", SOPClassUID=uid.EnhancedSRStorage), Reason.NOT_CT),
        (setting(RescaleType="Z_EFF"), Reason.NOT_HU),
        (setting(RescaleType="MGML"), Reason.NOT_HU),
        (without("ImagePositionPatient"), Reason.NO_POSITION),
        (without("ImageOrientationPatient"), Reason.NO_POSITION),
        (setting(ImagePositionPatient=[0, 0]), Reason.NO_POSITION),
        (setting(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), Reason.NO_POSITION),
        (setting(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]), Reason.NOT_AXIAL),  # coronal
        (setting(ImageOrientationPatient=[0, 1, 0, 0, 0, -1]), Reason.NOT_AXIAL),  # sagittal
        (setting(RescaleSlope=0), Reason.BAD_RESCALE),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else "",
)
def test_what_is_no_axial_ct_slice_is_set_aside_with_its_reason(tmp_path, change, reason):
    found = screened_header(write_slice(tmp_path, change))

    assert isinstance(found, SetAside)
    assert found.reason == reason
    assert IDENTITY.patient_id not in found.detail
    assert "Phantom" not in found.detail


def test_a_file_set_aside_still_names_its_series(tmp_path):
    found = screened_header(write_slice(tmp_path, setting(RescaleSlope=0)))

    assert found == SetAside(Reason.BAD_RESCALE, "RescaleSlope is 0", IDENTITY.series_uid)


def test_a_transfer_syntax_without_decoder_is_set_aside(tmp_path):
    def change(dataset):
        dataset.file_meta.TransferSyntaxUID = uid.MPEG2MPML
        dataset.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
        dataset["PixelData"].is_undefined_length = True

    assert outcome(write_slice(tmp_path, change)) == Reason.UNSUPPORTED_TRANSFER_SYNTAX


@pytest.mark.parametrize("garbage", [b"not a number", b"nan         ", b"1\\2         "])
def test_a_rescale_that_is_no_number_is_set_aside(tmp_path, garbage):
    path = write_slice(tmp_path, setting(RescaleIntercept="-1023.987654"))
    path.write_bytes(path.read_bytes().replace(b"-1023.987654", garbage))

    assert outcome(path) == Reason.BAD_RESCALE


def test_a_header_whose_values_cannot_be_read_is_set_aside(tmp_path):
    path = write_slice(tmp_path, setting(NumberOfFrames="12345678"))
    path.write_bytes(path.read_bytes().replace(b"12345678", b"abcdefgh"))

    assert outcome(path) == Reason.UNREADABLE_HEADER


@pytest.mark.parametrize("keyword", ["Modality", "SeriesInstanceUID", "Rows", "ImageType"])
def test_an_element_that_decides_something_and_cannot_be_read_sets_the_file_aside(tmp_path, keyword):
    path = with_unknown_vr(write_slice(tmp_path), keyword)

    assert outcome(path) == Reason.UNREADABLE_HEADER


@pytest.mark.parametrize("keyword", OPTIONAL)
def test_an_element_that_only_describes_and_cannot_be_read_counts_as_missing(tmp_path, keyword):
    path = with_unknown_vr(write_slice(tmp_path, all_optional), keyword)

    assert outcome(path) == "usable"
    assert keyword not in read_header(path)
    assert slice_of(path, read_whole(path)) == slice_of(path, read_header(path))


def test_a_deflated_file_cannot_ask_for_gigabytes(tmp_path):
    path = write_slice(tmp_path)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    assert outcome(path) == "usable"
    deflater, zeros = zlib.compressobj(9, wbits=-zlib.MAX_WBITS), b"\0" * 2**20
    bomb = b"".join(deflater.compress(zeros) for _ in range(2**10 // 2)) + deflater.flush()  # of half a gigabyte
    content = path.read_bytes()
    start = 144 + int.from_bytes(content[140:144], "little")
    path.write_bytes(content[:start] + bomb)

    tracemalloc.start()
    found = screened_header(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (found.reason, found.detail[:28]) == (Reason.NOT_DICOM, "a deflated data set of more ")
    assert peak < 16 * 2**20


@pytest.mark.parametrize("content", [b"", b"patients: none\n", b"\0" * 4096, bytes(range(256)) * 20])
def test_a_file_that_is_no_dicom_is_set_aside(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)

    assert outcome(path) == Reason.NOT_DICOM


def test_a_file_without_preamble_and_marker_is_read_all_the_same(tmp_path):
    path = write_slice(tmp_path)
    path.write_bytes(path.read_bytes()[132:])

    assert outcome(path) == "usable"


def test_an_export_without_sop_class_is_usable_where_the_modality_says_ct(tmp_path):
    assert outcome(write_slice(tmp_path, without("SOPClassUID"))) == "usable"


@pytest.mark.parametrize(("degrees", "expected"), [(30, "usable"), (34, "usable"), (36, Reason.NOT_AXIAL)])
def test_a_gantry_may_tilt_but_a_reformat_may_not(tmp_path, degrees, expected):
    angle = np.radians(degrees)
    path = write_slice(tmp_path, setting(ImageOrientationPatient=[1, 0, 0, 0, np.cos(angle), -np.sin(angle)]))

    assert outcome(path) == expected


@pytest.mark.parametrize(
    "orientation",
    [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0], [2, 0, 0, 0, 3, 0]],
)
def test_the_normal_of_an_axial_slice_points_to_the_head_whichever_way_the_image_is_flipped(orientation):
    normal = slice_normal(np.array(orientation, dtype=np.float64))

    assert normal.tolist() == [0, 0, 1]
    assert tilt_degrees(normal) == 0
