import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch
from enhanced import write_enhanced
from scipy.ndimage import map_coordinates
from synthetic import random_hu, write_ct

from models.ct.series import read_series
from models.ct.volume import PREPARATIONS, UnusableVolume, prepare_volume, read_volume
from models.ct.windows import Window

WIDE = Window("wide", low=-1000.0, high=1000.0)
MERLIN, CT_CLIP = PREPARATIONS["merlin"], PREPARATIONS["ct_clip"]
PIXEL, STEP = 0.75, 5.0  # mm, as synthetic.write_ct writes them

# ImageOrientationPatient of four ways to lie in a scanner, and the corner at which the first pixel then lies
# for the same box of the patient: x from -12 to 12 mm, y from -9 to 12 mm.
STORED = {
    "on the back": ([1, 0, 0, 0, 1, 0], (-12, -9)),
    "on the face": ([-1, 0, 0, 0, -1, 0], (12, 12)),
    "feet first": ([-1, 0, 0, 0, 1, 0], (12, -9)),
    "on the side": ([0, 1, 0, -1, 0, 0], (12, -9)),
}


def ramp(x, y, z):
    """HU, whole at every pixel, and another for every place and direction."""
    return 4 * x - 8 * y + 2 * z


def write_ramp(folder, stored="on the back", z_mm=tuple(STEP * k for k in range(6)), change=None):
    """Slices of the ramp over the box; `change(number, dataset)` may spoil each."""
    orientation, (x, y) = STORED[stored]
    to_columns, to_rows = np.array(orientation[:2]), np.array(orientation[3:5])
    along = {0: 33, 1: 29}  # pixels along x and along y
    columns, rows = along[int(abs(to_columns[1]))], along[int(abs(to_rows[1]))]
    row, column = np.indices((rows, columns))
    place = np.array([x, y]) + PIXEL * (column[..., None] * to_columns + row[..., None] * to_rows)

    def put(number, dataset):
        dataset.ImageOrientationPatient = orientation
        dataset.ImagePositionPatient = [x, y, z_mm[number]]
        if change:
            change(number, dataset)

    return write_ct(folder, [ramp(place[..., 0], place[..., 1], z) for z in z_mm], put)


def windowed(hu):
    return np.clip((hu + 1000) / 2000, 0, 1)


def volume_of(paths, shape, preparation=MERLIN, spacing_mm=(3.0, 1.5, 1.5)):
    volume, undecodable = read_volume(read_series(paths), spacing_mm, shape, WIDE, preparation)
    assert (volume.shape, volume.dtype) == (shape, np.float32)
    assert not undecodable
    return volume


@pytest.mark.parametrize("stored", STORED)
def test_a_voxel_holds_what_lies_at_its_place_in_the_patient_however_the_slices_are_stored(tmp_path, stored):
    volume = volume_of(write_ramp(tmp_path, stored), (7, 24, 12))

    # 25 mm are 9 voxels of 3 mm, of which 7 are kept; 24 mm are 17 of 1.5 mm, padded to 24; 21 mm are 15, cut to 12
    z = 3.0 + 3.0 * np.arange(7)  # to the head
    x = 12.0 - 1.5 * np.arange(17)  # to the right, which is where x falls
    y = 12.0 - 1.5 * np.arange(1, 13)  # to the front, which is where y falls
    expected = np.zeros((7, 24, 12))
    expected[:, 3:20] = windowed(ramp(x[:, None], y, z[:, None, None]))
    np.testing.assert_allclose(volume, expected, atol=1e-6)


@pytest.mark.parametrize("stored", STORED)
def test_ct_clip_sees_the_left_and_the_back_where_merlin_sees_the_right_and_the_front(tmp_path, stored):
    volume = volume_of(write_ramp(tmp_path, stored), (6, 33, 29), CT_CLIP, (STEP, PIXEL, PIXEL))

    x, y, z = -12 + PIXEL * np.arange(33), -9 + PIXEL * np.arange(29), STEP * np.arange(6)
    np.testing.assert_allclose(volume, windowed(ramp(x[:, None], y, z[:, None, None])), atol=1e-6)


def test_merlins_volume_is_resampled_from_the_first_voxels_centre_and_windowed_afterwards(tmp_path):
    hu = random_hu(6, 34)  # -1024 to 2000: beyond the window

    volume = volume_of(write_ct(tmp_path, hu), (9, 18, 18))  # of 17.5, and the last one's centre lies outside

    body = hu.transpose(0, 2, 1)[:, ::-1, ::-1]  # to the head, the right, the front
    at = np.meshgrid(np.arange(9) * 3.0 / STEP, *[np.arange(18) * 1.5 / PIXEL] * 2, indexing="ij")
    np.testing.assert_allclose(volume, windowed(map_coordinates(body, at, order=1, mode="nearest")), atol=1e-5)


def test_ct_clips_volume_is_windowed_and_then_resampled_between_the_outer_edges(tmp_path):
    hu = random_hu(6, 32)

    volume = volume_of(write_ct(tmp_path, hu), (20, 20, 28), CT_CLIP, (2.0, 1.0, 1.0))

    body = torch.from_numpy(windowed(hu.transpose(0, 2, 1)))[None, None]
    resampled = torch.nn.functional.interpolate(body, size=(15, 24, 24), mode="trilinear", align_corners=False)
    expected = np.zeros((20, 20, 28))
    expected[2:17, :, 2:26] = resampled[0, 0, :, 2:22]
    np.testing.assert_allclose(volume, expected, atol=1e-5)


def test_a_whole_number_of_voxels_is_not_one_less_for_the_rounding_of_its_length(tmp_path):
    def widen(_, dataset):
        dataset.PixelSpacing = [0.7, 0.7]

    paths = write_ct(tmp_path, np.zeros((3, 20, 20), np.float32), widen)  # 20 * 0.7 = 14, but 19 * 0.7 + 0.7 is less

    assert (volume_of(paths, (3, 14, 14), CT_CLIP, (STEP, 1.0, 1.0)) == 0.5).all()


def test_uneven_steps_and_gaps_are_filled_from_the_slices_true_positions(tmp_path):
    paths = write_ramp(tmp_path, z_mm=(0, 2.5, 4, 14, 15, 30))

    volume = volume_of(paths, (11, 17, 15))

    np.testing.assert_allclose(volume[:, 8, 8], windowed(ramp(0, 0, 3.0 * np.arange(11))), atol=1e-6)


def test_an_undecodable_slice_is_a_gap_and_is_reported(tmp_path):
    paths = write_ramp(tmp_path)
    series = read_series(paths)
    for number in (0, 2, 5):
        paths[number].write_bytes(paths[number].read_bytes()[:-100])

    volume, undecodable = read_volume(series, (STEP, 1.5, 1.5), (6, 17, 15), WIDE, MERLIN)

    assert list(undecodable) == [(paths[number], None) for number in (0, 2, 5)]
    assert {each.reason for each in undecodable.values()} == {"undecodable"}
    # slice 2 is interpolated; slice 0 has nothing below it and slice 5 nothing above
    np.testing.assert_allclose(volume[:, 8, 8], windowed(ramp(0, 0, np.array([5, 5, 10, 15, 20, 20]))), atol=1e-6)


def test_a_volume_is_written_over_whatever_was_there(tmp_path):
    series, out = read_series(write_ramp(tmp_path)), np.full((7, 24, 12), 7.0, np.float32)

    volume, _ = read_volume(series, (3.0, 1.5, 1.5), out.shape, WIDE, MERLIN, out)

    assert volume is out
    np.testing.assert_array_equal(out, volume_of([each.path for each in series.slices], out.shape))


@pytest.mark.parametrize("preparation", PREPARATIONS)
def test_memory_does_not_grow_with_the_number_of_slices(tmp_path, preparation):
    paths = write_ct(tmp_path, random_hu(60, 128))  # 4 MB
    tracemalloc.start()

    volume_of(paths, (8, 16, 16), PREPARATIONS[preparation])

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


def spoilt(number, dataset, keyword, value):
    if number == 3:
        setattr(dataset, keyword, value)


@pytest.mark.parametrize(
    ("keyword", "value", "complaint"),
    [
        ("PixelSpacing", None, "PixelSpacing in 5 of 6 slices"),
        ("PixelSpacing", [0.8, 0.8], "pixels of 0.75 to 0.8 mm"),
        ("Rows", 28, "slices of 28 x 33, 29 x 33 pixels"),
    ],
)
def test_slices_that_do_not_fit_together_make_no_volume(tmp_path, keyword, value, complaint):
    paths = write_ramp(tmp_path, change=lambda number, dataset: spoilt(number, dataset, keyword, value))

    with pytest.raises(UnusableVolume, match=complaint):
        volume_of(paths, (7, 24, 12))


def test_pixel_spacings_that_differ_by_their_rounding_do(tmp_path):
    paths = write_ramp(
        tmp_path, change=lambda number, dataset: spoilt(number, dataset, "PixelSpacing", [0.75001, 0.75])
    )

    volume_of(paths, (7, 24, 12))


@pytest.mark.parametrize("pixel", [0.0, -0.75, 1e9])
def test_no_header_can_ask_for_a_volume_of_nothing_or_of_gigabytes(tmp_path, pixel):
    def spoil(_, dataset):
        dataset.PixelSpacing = [pixel, pixel]

    with pytest.raises(UnusableVolume, match="expected two voxels at least in 5000 mm at most"):
        volume_of(write_ramp(tmp_path, change=spoil), (7, 24, 12))


def test_the_frames_of_one_file_are_the_volume_that_single_slices_are(tmp_path):
    hu = random_hu(slices=7)
    shape, spacing = (1, 8, 16, 16), (5.0, 1.5, 1.5)
    frames, singles = np.empty(shape, np.float32), np.empty(shape, np.float32)

    series = prepare_volume([write_enhanced(tmp_path / "one", hu)], frames, spacing, WIDE, "merlin")
    prepare_volume(write_ct(tmp_path / "many", hu), singles, spacing, WIDE, "merlin")

    assert [each.frame for each in series.slices] == [1, 2, 3, 4, 5, 6, 7]
    np.testing.assert_array_equal(frames, singles)


def test_one_slice_is_no_volume(tmp_path):
    series = read_series(write_ramp(tmp_path))
    for each in series.slices[1:]:
        each.path.write_bytes(each.path.read_bytes()[:-100])

    with pytest.raises(UnusableVolume, match="1 of 6 slices can be decoded"):
        read_volume(series, (3.0, 1.5, 1.5), (7, 24, 12), WIDE, MERLIN)
    with pytest.raises(UnusableVolume, match=r"1 slice\(s\), expected two"):
        alone = dataclasses.replace(series, slices=series.slices[:1])
        read_volume(alone, (3.0, 1.5, 1.5), (7, 24, 12), WIDE, MERLIN)
