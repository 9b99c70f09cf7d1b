"""Enhanced multi-frame CT: its frames are slices, one by one, from the functional groups to the embedding."""

import time
from pathlib import Path

import numpy as np
import psutil
import pydicom
import pytest
from enhanced import enhanced_ct, groups, in_syntax, write_enhanced
from highdicom.legacy import LegacyConvertedEnhancedCTImage
from pydicom import uid
from synthetic import SPACING, random_hu, write_ct

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.reasons import Reason
from models.ct.screening import Frames, SetAside, screened_header
from models.ct.series import Finding, Status, read_series, read_slices
from models.ct.slices import prepare_slice
from models.ct.windows import LUNG

SYNTAXES = [
    in_syntax(uid.ExplicitVRLittleEndian),
    in_syntax(uid.ImplicitVRLittleEndian),
    in_syntax(uid.ExplicitVRBigEndian),
    in_syntax(uid.DeflatedExplicitVRLittleEndian),
    in_syntax(uid.RLELossless),
    in_syntax(uid.RLELossless, offsets="no"),
    in_syntax(uid.RLELossless, offsets="extended"),
    in_syntax(uid.JPEGLSLossless, offsets="no", fragments=3),
    in_syntax(uid.JPEGLSLossless, fragments=3),
    in_syntax(uid.JPEG2000Lossless),
]
NAMES = ["explicit", "implicit", "big", "deflated", "rle", "rle-no", "rle-eot", "jls-3-no", "jls-3", "j2k"]


def reasons(path: Path) -> list[Reason | None]:
    return [each.reason if isinstance(each, SetAside) else None for each in read_slices(path)]


@pytest.mark.parametrize("change", SYNTAXES, ids=NAMES)
def test_each_frame_is_read_by_its_number_in_every_way_of_storing_it(tmp_path, change):
    hu = random_hu(slices=5)
    path = write_enhanced(tmp_path, hu, change)

    for number in (5, 1, 3, 2, 4):
        np.testing.assert_array_equal(read_hu(path, number), hu[number - 1])


def test_frames_are_slices_feet_to_head_by_position_whatever_their_order_in_the_file(tmp_path):
    path = write_enhanced(tmp_path, random_hu(slices=5), z_mm=[10, 0, 20, 15, 5])

    series = read_series([path])

    assert [each.frame for each in series.slices] == [2, 5, 1, 4, 3]
    assert [each.z_mm for each in series.slices] == [0, 5, 10, 15, 20]
    assert {each.sop_uid for each in series.slices} == {path.stem}
    assert series.verdict().status == Status.ACCEPTED
    assert series.geometry()["kernels"] == ["STANDARD"]
    assert series.geometry()["pixel_spacing_mm"] == SPACING[1:]


def test_the_rescale_of_each_frame_is_applied_once(tmp_path):
    hu = np.round(random_hu(slices=3) / 4) * 4
    path = write_enhanced(tmp_path, hu, rescale=[(1, -1024), (2, -1024), (4, -2048)])

    for number in (1, 2, 3):
        np.testing.assert_array_equal(read_hu(path, number), hu[number - 1])
    assert [each.slope for each in read_series([path]).slices] == [1, 2, 4]


def test_what_a_frame_says_stands_before_what_all_share(tmp_path):
    def change(dataset):
        dataset.PerFrameFunctionalGroupsSequence[1].CTReconstructionSequence = groups(
            CTReconstructionSequence={"ConvolutionKernel": "BONE"}
        ).CTReconstructionSequence

    assert [each.kernel for each in read_slices(write_enhanced(tmp_path, random_hu(3), change))] == [
        "STANDARD",
        "BONE",
        "STANDARD",
    ]


def test_frames_that_are_no_axial_slices_are_set_aside_one_by_one(tmp_path):
    def change(dataset):
        frames = dataset.PerFrameFunctionalGroupsSequence
        kind = {"FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}
        frames[0].CTImageFrameTypeSequence = groups(CTImageFrameTypeSequence=kind).CTImageFrameTypeSequence
        frames[1].PlaneOrientationSequence = groups(
            PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
        ).PlaneOrientationSequence
        del frames[2].PlanePositionSequence
        frames[3].PixelValueTransformationSequence[0].RescaleSlope = 0
        frames[4].PixelValueTransformationSequence[0].RescaleType = "Z_EFF"

    path = write_enhanced(tmp_path, random_hu(slices=8), change)
    series = read_series([path])

    named = [Reason.LOCALIZER, Reason.NOT_AXIAL, Reason.NO_POSITION, Reason.BAD_RESCALE, Reason.NOT_HU]
    assert reasons(path) == [*named, None, None, None]
    assert [each.frame for each in series.slices] == [6, 7, 8]
    assert [(each.frame, each.reason) for _, each in series.set_aside] == [*enumerate(named, start=1)]


def test_a_file_of_which_no_frame_is_usable_is_set_aside_with_the_commonest_reason(tmp_path):
    def change(dataset):
        kind = {"FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}
        dataset.SharedFunctionalGroupsSequence[0].CTImageFrameTypeSequence = groups(
            CTImageFrameTypeSequence=kind
        ).CTImageFrameTypeSequence
        del dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence

    found = screened_header(write_enhanced(tmp_path, random_hu(slices=3), change))

    assert (found.reason, found.detail) == (Reason.LOCALIZER, "none of 3 frames is usable, 3 for this reason")


def test_frames_without_a_functional_group_each_are_set_aside_as_a_whole(tmp_path):
    def short(dataset):
        del dataset.PerFrameFunctionalGroupsSequence[-1]

    found = screened_header(write_enhanced(tmp_path, random_hu(slices=3), short))

    assert (found.reason, found.detail) == (Reason.MULTIFRAME, "2 per-frame functional groups for 3 frames")


def test_a_file_that_ends_early_loses_the_frames_beyond_its_end_only(tmp_path):
    hu = random_hu(slices=4)
    path = write_enhanced(tmp_path, hu)
    path.write_bytes(path.read_bytes()[: -hu[0].size * 2 - 10])  # the last frame, and ten bytes of the one before

    for number in (1, 2):
        np.testing.assert_array_equal(read_hu(path, number), hu[number - 1])
    for number in (3, 4, 5):
        with pytest.raises(UndecodableSlice):
            read_hu(path, number)


def test_an_item_is_first_counted_and_then_prepared_frame_by_frame(tmp_path):
    hu = random_hu(slices=3)
    path, singles = write_enhanced(tmp_path / "one", hu), write_ct(tmp_path / "many", hu)
    out, twin = np.zeros((2, 1, 16, 16), np.float32)

    assert prepare_slice(path, out, (LUNG,), 16) == Frames(3)
    for number, single in enumerate(singles, start=1):
        said = prepare_slice((path, number), out, (LUNG,), 16)
        prepare_slice(single, twin, (LUNG,), 16)
        assert (said.frame, said.z_mm) == (number, (number - 1) * SPACING[0])
        np.testing.assert_array_equal(out, twin)


def test_an_enhanced_file_of_one_frame_is_a_frame_too(tmp_path):
    path = write_enhanced(tmp_path, random_hu(slices=1))

    assert [each.frame for each in read_slices(path)] == [1]


def test_what_highdicom_makes_of_single_frames_is_read_as_they_were(tmp_path):
    hu = random_hu(slices=6)
    singles = write_ct(tmp_path, hu)
    converted = LegacyConvertedEnhancedCTImage(
        [pydicom.dcmread(path) for path in reversed(singles)],
        series_instance_uid=uid.generate_uid(),
        series_number=2,
        sop_instance_uid=uid.generate_uid(),
        instance_number=1,
    )
    path = tmp_path / "converted.dcm"
    converted.save_as(path)

    one, many = read_series([path]), read_series(singles)

    assert pydicom.dcmread(path).SOPClassUID == uid.LegacyConvertedEnhancedCTImageStorage
    assert [each.z_mm for each in one.slices] == [each.z_mm for each in many.slices]
    assert one.geometry() == many.geometry()
    for frame, single in zip(one.slices, many.slices, strict=True):
        np.testing.assert_array_equal(read_hu(path, frame.frame), read_hu(single.path))


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless])
def test_memory_and_time_do_not_grow_with_the_frames_that_are_not_asked_for(tmp_path, syntax):
    hu = np.tile(random_hu(slices=1, size=256), (100, 1, 1))
    few = write_enhanced(tmp_path / "few", hu[:2], in_syntax(syntax))
    many = write_enhanced(tmp_path / "many", hu, in_syntax(syntax))
    read_hu(few, 1)
    read_hu(many, 1)  # its header is parsed once
    process = psutil.Process()
    before = process.memory_info().rss

    begun = time.process_time()
    for number in range(1, 101, 5):
        np.testing.assert_array_equal(read_hu(many, number), hu[0])
    seconds = time.process_time() - begun

    begun = time.process_time()
    for _ in range(20):
        read_hu(few, 2)
    assert seconds < 5 * (time.process_time() - begun)
    assert process.memory_info().rss - before < 8e6  # bytes; the file decoded is 26 MB in HU, 13 MB stored


def test_the_real_two_frame_perfusion_map_is_read_as_what_it_says(data):
    path = data / "oddities" / "pydicom" / "eCT_Supplemental.dcm"
    stored = pydicom.dcmread(path).pixel_array.astype(np.float32)

    series = read_series([path])

    assert [(each.frame, each.z_mm) for each in series.slices] == [(1, -159.0), (2, -149.0)]
    for each in series.slices:
        np.testing.assert_array_equal(read_hu(path, each.frame), stored[each.frame - 1] - 1024)
    assert series.verdict().findings == (Finding("unit_unspecified", {"slices": 2, "assumed": "HU"}),)


def test_a_real_file_of_fragmented_frames_without_offsets_is_read_frame_by_frame(data):
    path = data / "oddities" / "cornerstone" / "CT0012.fragmented_no_bot_jpeg_baseline.51.dcm"
    plain = pydicom.dcmread(data / "oddities" / "pydicom" / "eCT_Supplemental.dcm").pixel_array

    for number in (2, 1):  # stored 1024 higher than its predecessor, and lossy
        difference = read_hu(path, number) - plain[number - 1]
        assert np.abs(difference).mean() < 2
    assert [each.code for each in read_series([path]).verdict().findings] == ["unit_unspecified", "lossy_source"]


def test_a_multiframe_dataset_is_what_the_test_says(tmp_path):
    dataset = enhanced_ct(random_hu(slices=2))

    assert dataset.NumberOfFrames == 2
    np.testing.assert_array_equal(dataset.pixel_array.astype(np.float32) - 1024, random_hu(slices=2))
