import numpy as np
import pydicom
import pytest
from pydicom import uid
from synthetic import SPACING, random_hu, write_ct

from models.ct.reasons import Reason
from models.ct.screening import SetAside
from models.ct.series import CTSeries, Finding, Status, Verdict, arrange, read_series, read_slices


def names(series: CTSeries) -> list[str]:
    return [each.path.name for each in series.slices]


def set_aside(series: CTSeries) -> list[tuple[str, Reason]]:
    return [(name, each.reason) for name, each in series.set_aside]


def changed(number, **elements):
    """A change to one slice of a series."""

    def change(k, dataset):
        if k == number:
            for keyword, value in elements.items():
                setattr(dataset, keyword, value)

    return change


FILES = [f"{number:04d}.dcm" for number in range(6)]


def test_a_whole_even_series_is_accepted_without_findings(tmp_path):
    series = read_series(write_ct(tmp_path))

    assert names(series) == FILES
    assert series.set_aside == ()
    assert series.verdict() == Verdict(Status.ACCEPTED, ())
    assert series.geometry() == {
        "slices": 6,
        "rows": 32,
        "columns": 32,
        "pixel_spacing_mm": SPACING[1:],
        "slice_spacing_mm": 5.0,
        "z_mm": [0.0, 25.0],
        "tilt_degrees": 0.0,
        "kernels": ["STANDARD"],
    }


def test_slices_are_ordered_by_position_and_not_by_instance_number_or_file_name(tmp_path):
    heights = [10, -20, 0, 30, -10, 20]  # mm, in the order of the file names and of InstanceNumber

    def change(number, dataset):
        dataset.ImagePositionPatient = [-12, -12, heights[number]]
        dataset.InstanceNumber = number + 1

    series = read_series(write_ct(tmp_path, change=change))

    assert [each.z_mm for each in series.slices] == sorted(heights)
    assert names(series) == [FILES[k] for k in np.argsort(heights)]
    assert series.verdict() == Verdict(Status.ACCEPTED, ())


@pytest.mark.parametrize("orientation", [[1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0]])
def test_slices_run_feet_to_head_where_the_cross_product_points_to_the_feet(tmp_path, orientation):
    def change(number, dataset):
        dataset.ImageOrientationPatient = orientation

    series = read_series(reversed(write_ct(tmp_path, change=change)))

    assert names(series) == FILES
    assert [each.z_mm for each in series.slices] == [0, 5, 10, 15, 20, 25]


@pytest.mark.parametrize("flip", [1, -1])
def test_a_tilted_gantry_is_measured_along_its_own_normal(tmp_path, flip):
    angle = np.radians(15)

    def change(number, dataset):  # the table moves along z, the slices lie at 15 degrees to it
        dataset.ImageOrientationPatient = [1, 0, 0, 0, flip * np.cos(angle), -flip * np.sin(angle)]

    series = read_series(write_ct(tmp_path, change=change))

    assert names(series) == FILES
    assert series.spacing_mm == pytest.approx(5 * np.cos(angle), abs=1e-3)
    assert series.verdict() == Verdict(Status.ACCEPTED_WITH_WARNINGS, (Finding("tilted", {"degrees": 15.0}),))


def test_of_two_slices_at_one_position_the_first_acquisition_is_kept_and_the_other_counted(tmp_path):
    def change(number, dataset):
        dataset.AcquisitionNumber = 2 if number == 0 else 1
        if number < 2:
            dataset.ImagePositionPatient = [-12, -12, 5.01]

    series = read_series(write_ct(tmp_path, change=change))

    assert names(series) == FILES[1:]
    assert set_aside(series) == [(FILES[0], Reason.DUPLICATE_POSITION)]
    assert series.verdict() == Verdict(
        Status.ACCEPTED_WITH_WARNINGS, (Finding("slices_set_aside", {"duplicate_position": 1}),)
    )


def test_of_slices_of_different_content_at_one_position_the_first_instance_is_used_whatever_the_files_are_called(
    tmp_path,
):
    def change(number, dataset):
        dataset.InstanceNumber = 6 - number
        if number < 2:
            dataset.ImagePositionPatient = [-12, -12, 5 + 0.02 * number]

    paths = write_ct(tmp_path, change=change)
    series = read_series(paths)
    renamed = [path.rename(path.with_name(f"{9 - k}.dcm")) for k, path in enumerate(paths)]

    (name, found), *_ = series.set_aside
    assert names(series) == FILES[1:]
    assert (name, found.reason) == (FILES[0], Reason.DUPLICATE_POSITION)
    assert found.detail == f"{series.slices[0].sop_uid} lies at 5.02 mm too, and is used"
    assert [each.sop_uid for each in read_series(renamed).slices] == [each.sop_uid for each in series.slices]


def stacked(*stacks):
    """A change that gives the slices, in order, the positions of some stacks: (acquisition, kernel, positions)."""
    places = [(acquisition, kernel, z) for acquisition, kernel, positions in stacks for z in positions]

    def change(number, dataset):
        dataset.AcquisitionNumber, dataset.ConvolutionKernel, z = places[number]
        dataset.ImagePositionPatient = [-12, -12, z]

    return change


@pytest.mark.parametrize("other", [(2, "STANDARD"), (1, "BONE")], ids=["acquisition", "kernel"])
def test_of_two_stacks_that_overlap_the_larger_is_used_and_the_other_only_beyond_it(tmp_path, other):
    change = stacked((*other, [7, 27]), (1, "STANDARD", [0, 5, 10, 15]))

    series = read_series(write_ct(tmp_path, change=change))

    assert [each.z_mm for each in series.slices] == [0, 5, 10, 15, 27]
    assert set_aside(series) == [(FILES[0], Reason.OVERLAPPING_STACK)]
    assert series.set_aside[0][1].detail.startswith("at 7.0 mm the larger stack of acquisition 1")


def test_of_two_stacks_at_the_same_positions_one_is_used_throughout(tmp_path):
    change = stacked((2, "BONE", [0, 5, 10]), (1, "STANDARD", [0, 5, 10]))

    series = read_series(write_ct(tmp_path, change=change))

    assert {(each.acquisition, each.kernel) for each in series.slices} == {(1, "STANDARD")}
    assert {reason for _, reason in set_aside(series)} == {Reason.DUPLICATE_POSITION}
    assert [each.code for each in series.verdict().findings] == ["slices_set_aside"]


def test_an_acquisition_that_goes_on_where_another_ended_is_part_of_the_series(tmp_path):
    series = read_series(write_ct(tmp_path, change=stacked((1, "A", [0, 5, 10, 15]), (2, "A", [20, 25]))))

    assert len(series.slices) == 6
    assert series.verdict() == Verdict(Status.ACCEPTED, ())


def test_acquisitions_that_lie_evenly_between_each_other_are_one_scan(tmp_path):
    series = read_series(write_ct(tmp_path, change=stacked((1, "A", [0, 10, 20]), (2, "A", [5, 15, 25]))))

    assert [each.z_mm for each in series.slices] == [0, 5, 10, 15, 20, 25]
    assert series.verdict() == Verdict(Status.ACCEPTED, ())


def test_a_gap_in_the_larger_stack_is_filled_by_the_smaller(tmp_path):
    series = read_series(write_ct(tmp_path, change=stacked((1, "A", [0, 5, 10, 20]), (2, "A", [14.5, 7]))))

    assert [each.z_mm for each in series.slices] == [0, 5, 10, 14.5, 20]
    assert set_aside(series) == [(FILES[5], Reason.OVERLAPPING_STACK)]


def test_a_series_without_positions_is_ordered_by_slice_location_and_says_so(tmp_path):
    def change(number, dataset):
        del dataset.ImagePositionPatient
        dataset.SliceLocation = [25, 20, 15, 10, 5, 0][number]

    series = read_series(write_ct(tmp_path, change=change))

    assert names(series) == FILES[::-1]
    assert series.verdict() == Verdict(
        Status.ACCEPTED_WITH_WARNINGS,
        (
            Finding(
                "position_assumed",
                {"slices": 6, "assumed": "SliceLocation is the position, growing towards the head"},
            ),
        ),
    )


def test_a_slice_without_position_among_others_that_have_one_is_set_aside(tmp_path):
    def change(number, dataset):
        dataset.SliceLocation = number * 5
        if number == 3:
            del dataset.ImagePositionPatient

    assert set_aside(read_series(write_ct(tmp_path, change=change))) == [(FILES[3], Reason.NO_POSITION)]


@pytest.mark.parametrize(
    ("position", "orientation"),
    [
        ("HFS", [1, 0, 0, 0, 1, 0]),
        ("FFS", [-1, 0, 0, 0, 1, 0]),
        ("HFP", [-1, 0, 0, 0, -1, 0]),
        ("FFP", [1, 0, 0, 0, -1, 0]),
    ],
)
def test_feet_first_and_prone_series_run_feet_to_head_too(tmp_path, position, orientation):
    def change(number, dataset):
        dataset.PatientPosition, dataset.ImageOrientationPatient = position, orientation

    series = read_series(write_ct(tmp_path, change=change))

    assert names(series) == FILES
    assert series.verdict() == Verdict(Status.ACCEPTED, ())


def test_a_unit_that_is_not_said_is_taken_for_hu_and_named(tmp_path):
    assert read_series(write_ct(tmp_path, change=changed(2, RescaleType="US"))).verdict().findings == (
        Finding("unit_unspecified", {"slices": 1, "assumed": "HU"}),
    )


def test_slices_a_tenth_of_a_millimetre_apart_are_not_duplicates(tmp_path):
    def change(number, dataset):
        dataset.ImagePositionPatient = [-12, -12, number * 0.1]

    assert names(read_series(write_ct(tmp_path, change=change))) == FILES


def test_a_gap_is_found_with_its_place_and_width(tmp_path):
    def change(number, dataset):
        dataset.ImagePositionPatient = [-12, -12, [0, 5, 10, 20, 25, 42.5][number]]

    series = read_series(write_ct(tmp_path, change=change))

    gaps = [{"after_slice": 2, "after_mm": 10, "gap_mm": 10}, {"after_slice": 4, "after_mm": 25, "gap_mm": 17.5}]
    assert series.spacing_mm == 5.0
    assert series.verdict() == Verdict(
        Status.ACCEPTED_WITH_WARNINGS, (Finding("missing_slices", {"gaps": gaps, "expected_mm": 5.0}),)
    )


def test_uneven_spacing_is_found_with_its_smallest_and_largest_step(tmp_path):
    def change(number, dataset):
        dataset.ImagePositionPatient = [-12, -12, [0, 5, 9, 14, 19, 25][number]]

    assert read_series(write_ct(tmp_path, change=change)).verdict() == Verdict(
        Status.ACCEPTED_WITH_WARNINGS,
        (Finding("uneven_spacing", {"min_mm": 4.0, "max_mm": 6.0, "expected_mm": 5.0, "after_mm": [5.0, 19.0]}),),
    )


def test_steps_that_differ_by_less_than_a_tenth_are_even(tmp_path):
    def change(number, dataset):
        dataset.ImagePositionPatient = [-12, -12, [0, 5, 9.6, 14.6, 19.6, 25][number]]

    assert read_series(write_ct(tmp_path, change=change)).verdict() == Verdict(Status.ACCEPTED, ())


def test_mixed_sizes_are_counted(tmp_path):
    sizes = [32, 32, 16, 32, 32, 32]

    series = read_series(write_ct(tmp_path, [random_hu(1, size)[0] for size in sizes]))

    assert [each.rows for each in series.slices] == sizes
    assert series.verdict().findings == (Finding("mixed_sizes", {"32x32": 5, "16x16": 1}),)


def test_mixed_kernels_are_counted(tmp_path):
    series = read_series(write_ct(tmp_path, change=changed(4, ConvolutionKernel=["B30f", "3"])))

    assert series.geometry()["kernels"] == ["B30f/3", "STANDARD"]
    assert series.verdict().findings == (Finding("mixed_kernels", {"STANDARD": 5, "B30f/3": 1}),)


def test_missing_rescale_is_a_finding_that_says_what_was_assumed(tmp_path):
    def change(number, dataset):
        if number == 1:
            del dataset.RescaleSlope
        if number in {1, 2}:
            del dataset.RescaleIntercept

    series = read_series(write_ct(tmp_path, change=change))

    assert [each.slope for each in series.slices] == [1, None, 1, 1, 1, 1]
    assert [each.intercept for each in series.slices] == [-1024, None, None, -1024, -1024, -1024]
    assert series.verdict().findings == (Finding("missing_rescale", {"slices": 2, "assumed": "slope 1, intercept 0"}),)


def test_a_lossy_source_is_a_finding(tmp_path):
    assert read_series(write_ct(tmp_path, change=changed(3, LossyImageCompression="01"))).verdict().findings == (
        Finding("lossy_source", {"slices": 1}),
    )


def test_a_slice_turned_against_the_others_is_set_aside(tmp_path):
    angle = np.radians(10)
    turned = changed(2, ImageOrientationPatient=[1, 0, 0, 0, np.cos(angle), -np.sin(angle)])

    series = read_series(write_ct(tmp_path, change=turned))

    assert names(series) == [name for name in FILES if name != FILES[2]]
    assert set_aside(series) == [(FILES[2], Reason.ORIENTATION_DIFFERS)]


def test_what_is_no_slice_is_set_aside_and_the_rest_is_read(tmp_path):
    def change(number, dataset):
        if number == 0:
            dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        if number == 5:
            dataset.SOPClassUID = uid.SecondaryCaptureImageStorage

    paths = write_ct(tmp_path, change=change)
    (tmp_path / "readme.txt").write_text("not a slice")
    series = read_series([*paths, tmp_path / "readme.txt"])

    assert names(series) == FILES[1:5]
    assert set_aside(series) == [
        (FILES[0], Reason.LOCALIZER),
        (FILES[5], Reason.SECONDARY_CAPTURE),
        ("readme.txt", Reason.NOT_DICOM),
    ]
    assert series.verdict() == Verdict(
        Status.ACCEPTED_WITH_WARNINGS,
        (Finding("slices_set_aside", {"localizer": 1, "secondary_capture": 1, "not_dicom": 1}),),
    )


def test_a_series_without_a_usable_slice_is_rejected(tmp_path):
    paths = write_ct(tmp_path, change=lambda number, dataset: setattr(dataset, "Modality", "MR"))

    assert read_series(paths).verdict() == Verdict(Status.REJECTED, (Finding("no_usable_slices", {"set_aside": 6}),))
    assert read_series([]).verdict() == Verdict(Status.REJECTED, (Finding("no_usable_slices", {"set_aside": 0}),))


def test_a_single_slice_is_accepted_with_a_warning(tmp_path):
    series = read_series(write_ct(tmp_path, random_hu(slices=1)))

    assert series.spacing_mm is None
    assert series.verdict() == Verdict(Status.ACCEPTED_WITH_WARNINGS, (Finding("single_slice"),))


def test_undecodable_slices_are_set_aside_with_the_verdict_of_what_is_left(tmp_path):
    paths = write_ct(tmp_path)
    slices = [read_slices(path)[0] for path in paths]
    broken = SetAside(Reason.UNDECODABLE, "RuntimeError while decoding")

    left = arrange(zip(paths, [*slices[:2], broken, *slices[3:]], strict=True))

    assert left.slices == (*slices[:2], *slices[3:])
    assert left.set_aside == ((FILES[2], broken),)
    assert left.verdict() == Verdict(
        Status.ACCEPTED_WITH_WARNINGS,
        (
            Finding(
                "missing_slices", {"gaps": [{"after_slice": 1, "after_mm": 5.0, "gap_mm": 10.0}], "expected_mm": 5.0}
            ),
            Finding("slices_set_aside", {"undecodable": 1}),
        ),
    )
    assert arrange((path, broken) for path in paths).verdict().status == Status.REJECTED


def test_a_real_chest_ct_is_read_whole_and_feet_to_head(lidc_0001):
    series = read_series(lidc_0001)
    by_height = sorted(lidc_0001, key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])

    assert len(series.slices) == 133
    assert [each.path for each in series.slices] == by_height
    assert series.spacing_mm == 2.5
    assert series.verdict() == Verdict(Status.ACCEPTED, ())


def test_an_acquisition_number_that_is_no_number_sets_nothing_aside(tmp_path):
    paths = write_ct(tmp_path, change=changed(3, AcquisitionNumber="8765"))
    paths[3].write_bytes(paths[3].read_bytes().replace(b"8765", b"inf "))

    assert len(read_series(paths).slices) == 6
