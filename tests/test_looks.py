"""How a training view looks at a slice: the same geometry for picture and mask, and where it looks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ct.slices import encoder_input
from models.ct.windows import ABDOMEN, LUNG, WIDE, Window
from models.lecl.config import ViewConfig
from models.lecl.looks import AIR, LESION_SIDES, SMALLEST, Look, lesion_look, slice_look
from models.lecl.sources import Box

SHAPE = (120, 150)
SEEDS = st.integers(0, 2**32 - 1)
PLAIN = {"scale": (1, 1), "flip": False, "rotate_degrees": 0, "noise_hu": (0, 0), "shift_hu": 0, "gain": 0}


@st.composite
def boxes(draw, largest=60):
    """Boxes of whole pixels anywhere in a slice of SHAPE, at its edges as well."""
    height, width = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    y0, x0 = draw(st.integers(0, SHAPE[0] - height)), draw(st.integers(0, SHAPE[1] - width))
    return Box(float(x0), float(y0), float(x0 + width - 1), float(y0 + height - 1))


def config(**changes):
    return ViewConfig(**({"size": 48} | PLAIN | changes))


def painted(box, shape=SHAPE):
    """1 in the box, 0 outside."""
    mask = np.zeros(shape, np.float32)
    mask[int(box.y0) : int(box.y1) + 1, int(box.x0) : int(box.x1) + 1] = 1
    return mask


def noisy(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(0, 300, shape).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(boxes(), SEEDS, st.sampled_from([None, 32]), st.floats(0, 90), st.booleans())
def test_a_mask_and_its_picture_agree_however_they_are_looked_at(box, seed, crop, degrees, of_lesion):
    random = np.random.default_rng(seed)
    turned = config(crop=crop, rotate_degrees=degrees, flip=True, scale=(0.7, 1.4))
    look = lesion_look(box, turned, random) if of_lesion else slice_look(SHAPE, turned, box, random)
    mask = painted(box)

    picture = look.at(WIDE.low + mask * (WIDE.high - WIDE.low), WIDE)

    np.testing.assert_allclose(picture, look.mask(mask), atol=1e-5)
    assert picture.shape == (crop or 48, crop or 48)
    assert (picture.dtype, picture.flags.c_contiguous) == (np.float32, True)
    assert 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize("degrees", [0.0, 20.0, -75.0, 90.0, 135.0, -180.0])
@pytest.mark.parametrize("flip", [False, True])
def test_a_pixel_of_the_view_is_the_pixel_of_the_slice_that_geometry_says(degrees, flip):
    look = Look(centre=(70.0, 60.0), step=(1.5, 2.5), side=40, degrees=degrees, flip=flip)
    rows, columns = np.mgrid[:200, :300].astype(np.float32)
    padded = replace(look, centre=(100.0, 150.0))

    row_seen, column_seen = (200 * padded.mask(rows / 200), 300 * padded.mask(columns / 300))

    turn, middle = np.radians(degrees), (look.side - 1) / 2
    for i in range(0, look.side, 3):
        for j in range(0, look.side, 3):
            down, right = i - middle, (-1 if flip else 1) * (j - middle)
            source_down = down * np.cos(turn) + right * np.sin(turn)  # counter-clockwise as one sees it
            source_right = right * np.cos(turn) - down * np.sin(turn)
            assert row_seen[i, j] == pytest.approx(99.5 + 1.5 * source_down, abs=1.0)
            assert column_seen[i, j] == pytest.approx(149.5 + 2.5 * source_right, abs=1.5)


@settings(deadline=None, max_examples=20)
@given(SEEDS)
def test_the_same_look_twice_is_the_same_picture_and_another_noise_is_another(seed):
    random = np.random.default_rng(seed)
    look = slice_look(SHAPE, ViewConfig(size=48, noise_hu=(5, 20)), None, random)
    hu = noisy()
    kept = hu.copy()

    assert look.at(hu, LUNG).tobytes() == look.at(hu, LUNG).tobytes()
    assert replace(look, noise_seed=look.noise_seed + 1).at(hu, LUNG).tobytes() != look.at(hu, LUNG).tobytes()
    np.testing.assert_array_equal(hu, kept)


@pytest.mark.parametrize("window", [ABDOMEN, LUNG])
@pytest.mark.parametrize(("shape", "size"), [((96, 128), 32), ((150, 150), 64), ((512, 512), 224), ((40, 40), 64)])
def test_a_plain_look_at_the_whole_slice_is_the_encoders_input(window, shape, size):
    hu = noisy(shape)
    whole = Look((shape[0] / 2, shape[1] / 2), (shape[0] / size, shape[1] / size), size)

    np.testing.assert_allclose(whole.at(hu, window), encoder_input(hu, (window,), size)[0], atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(SEEDS)
def test_a_view_without_augmentation_is_the_encoders_input_moved_by_a_twentieth_at_most(seed):
    look = slice_look((128, 96), config(size=32), None, np.random.default_rng(seed))
    hu = noisy((128, 96))
    down, right = round(look.centre[0]) - 64, round(look.centre[1]) - 48
    wide = np.full((128 + 40, 96 + 40), AIR, np.float32)
    wide[20:-20, 20:-20] = hu
    moved = wide[20 + down : 148 + down, 20 + right : 116 + right]

    assert (abs(down) <= 7, abs(right) <= 5) == (True, True)
    np.testing.assert_allclose(look.at(hu, LUNG), encoder_input(moved, (LUNG,), 32)[0], atol=1e-5)


def test_what_lies_beyond_the_slice_is_air():
    look = Look((0.0, 0.0), (1.0, 1.0), 40)
    seen = look.at(np.full((50, 50), 40, np.float32), WIDE)

    assert (seen[:20, :].max(), seen[:, :20].max()) == (0, 0)  # -1024 HU
    np.testing.assert_allclose(seen[20:, 20:], 0.52, atol=1e-5)
    assert not look.mask(np.ones((50, 50), np.float32))[:20].any()
    assert not Look((-500.0, 0.0), (1.0, 1.0), 40).mask(np.ones((50, 50), np.float32)).any()


def test_a_slice_is_windowed_before_it_is_resized():
    hu = np.tile(np.array([-1024, 3000], np.float32), (4, 2))

    assert Look((2.0, 2.0), (2.0, 2.0), 2).at(hu, ABDOMEN).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_gain_and_shift_are_of_hu():
    look = Look((20.0, 20.0), (1.0, 1.0), 40, gain=1.1, shift_hu=-15.0)

    np.testing.assert_allclose(
        look.at(np.full((40, 40), 100, np.float32), WIDE), (1.1 * 100 - 15 + 1000) / 2000, atol=1e-5
    )


def test_sharpening_adds_to_edges_what_softening_takes_and_leaves_flat_tissue_as_it_was():
    hu = np.where(np.arange(80) < 40, -50, 50).astype(np.float32) * np.ones((80, 1), np.float32)
    plain = Look((40.0, 40.0), (1.0, 1.0), 80)
    sharp, soft = (
        1000 * replace(plain, sharpen=share).at(hu, Window("linear", -500, 500)) - 500 for share in (1, -0.5)
    )

    own = 1 / np.exp(-(np.arange(-5, 6) ** 2) / 2).sum()  # of a pixel in its own blur; the others beside an edge cancel
    for seen, share in ((sharp, 1), (soft, -0.5)):
        np.testing.assert_allclose(seen[:, [30, 50]], [[-50, 50]] * 80, atol=0.01)
        np.testing.assert_allclose(seen[:, 40], 50 + share * (50 - 50 * own), atol=0.1)


def test_noise_has_its_standard_deviation_in_hu_and_is_correlated_over_about_a_pixel():
    look = Look((100.0, 100.0), (1.0, 1.0), 200, noise_hu=12.0)
    hu = (look.at(np.zeros((200, 200), np.float32), Window("linear", -500, 500)) - 0.5) * 1000

    assert hu.std() == pytest.approx(12, rel=0.01)
    assert abs(hu.mean()) < 0.5
    for pixels, low, high in ((1, 0.3, 0.7), (4, -0.03, 0.03)):
        assert low < np.corrcoef(hu[:, pixels:].ravel(), hu[:, :-pixels].ravel())[0, 1] < high


@settings(deadline=None, max_examples=60)
@given(boxes(), SEEDS, st.floats(0, 45))
def test_the_lesion_centred_crop_is_about_the_boxs_centre_and_not_its_corner(box, seed, degrees):
    look = lesion_look(box, config(rotate_degrees=degrees, flip=True), np.random.default_rng(seed))
    longer = max(box.y1 - box.y0, box.x1 - box.x0) + 1
    side = look.step[0] * look.side  # px of the slice

    assert look.step[0] == look.step[1]
    assert max(SMALLEST, LESION_SIDES[0] * longer) <= side + 1e-6
    assert side <= max(SMALLEST, LESION_SIDES[1] * longer) + 1e-6
    for at, low, high in ((look.centre[0], box.y0, box.y1), (look.centre[1], box.x0, box.x1)):
        assert abs(at - (low + high) / 2) <= min(0.15 * side, (side - longer) / 2) + 1e-6
    picture = look.mask(painted(box))
    rows, columns = np.mgrid[:48, :48] - 23.5
    centroid = np.array([(picture * rows).sum(), (picture * columns).sum()]) / picture.sum()
    assert np.hypot(*centroid) / 48 < 0.15 * 2**0.5 + 2 / side  # and rounding to pixels


def test_a_tight_lesion_centred_crop_is_moved_no_farther_than_keeps_the_lesion_in_it():
    looks = [lesion_look(Box(40, 30, 99, 89), config(), np.random.default_rng(seed)) for seed in range(150)]
    room = np.array([(look.step[0] * look.side - 60) / 2 for look in looks])  # px of the slice beside the lesion
    moved = np.array([max(abs(look.centre[0] - 59.5), abs(look.centre[1] - 69.5)) for look in looks])

    assert (moved <= room + 1e-6).all()
    assert (moved > 0.9 * room).any()


@settings(deadline=None, max_examples=60)
@given(boxes(), SEEDS, st.sampled_from([None, 32]))
def test_the_lesion_centred_crop_holds_the_whole_box_to_two_pixels(box, seed, crop):
    look = lesion_look(box, config(crop=crop, flip=True), np.random.default_rng(seed))
    along, down = (min(2, int(end - start) // 2) for start, end in ((box.x0, box.x1), (box.y0, box.y1)))
    inner = Box(box.x0 + along, box.y0 + down, box.x1 - along, box.y1 - down)

    for edge in (
        replace(inner, y1=inner.y0),
        replace(inner, y0=inner.y1),
        replace(inner, x1=inner.x0),
        replace(inner, x0=inner.x1),
    ):
        mask = painted(edge)
        assert look.mask(mask).sum() * look.step[0] * look.step[1] > 0.3 * mask.sum()


@settings(deadline=None, max_examples=40)
@given(boxes(), SEEDS, st.floats(0, 45))
def test_a_turned_lesion_centred_crop_loses_no_more_than_corners(box, seed, degrees):
    look = lesion_look(box, config(rotate_degrees=degrees), np.random.default_rng(seed))
    whole = replace(look, side=3 * look.side).mask(painted(box)).sum()  # the same scale, farther around

    assert look.mask(painted(box)).sum() > 0.8 * whole


@settings(deadline=None, max_examples=60)
@given(boxes(largest=20), SEEDS)
def test_a_crop_laid_for_a_lesion_has_it_in_the_view_and_not_always_in_the_middle(box, seed):
    cropping = config(size=96, crop=32, rotate_degrees=10, scale=(0.8, 1.25))
    look = slice_look(SHAPE, cropping, box, np.random.default_rng(seed))

    assert look.holds(box)
    if all(3 <= end - start < 12 for start, end in ((box.x0, box.x1), (box.y0, box.y1))):
        assert look.mask(painted(box)).sum() * look.step[0] * look.step[1] > 0.5 * painted(box).sum()


def test_crops_move_over_the_slice_and_around_the_lesion():
    cropping, box = config(size=96, crop=32), Box(70, 50, 78, 58)
    for lesion, spread in ((None, 15), (box, 5)):
        looks = [slice_look(SHAPE, cropping, lesion, np.random.default_rng(seed)) for seed in range(60)]
        centres = np.array([look.centre for look in looks])
        assert (centres.std(axis=0) > spread).all()
        assert {(look.step, look.side) for look in looks} == {((120 / 96, 150 / 96), 32)}


@settings(deadline=None, max_examples=60)
@given(boxes(largest=9), SEEDS)
def test_a_view_holds_a_box_whose_centre_is_well_in_it_and_none_whose_centre_is_out(box, seed):
    random = np.random.default_rng(seed)
    look = slice_look(SHAPE, config(size=96, crop=40, flip=True), None, random)
    middle = Box(*(2 * [(box.x0 + box.x1) // 2, (box.y0 + box.y1) // 2]))
    seen = look.mask(painted(middle))
    margin = replace(look, side=round(0.8 * look.side)).mask(painted(middle))

    assert look.holds(middle) or not margin.any()
    assert not look.holds(middle) or seen.any()


def test_augmentation_is_drawn_between_its_limits_and_flips_every_other_time():
    drawn = ViewConfig(size=48, scale=(0.5, 2.0), rotate_degrees=30, noise_hu=(3, 9), shift_hu=7, gain=0.1)
    looks = [slice_look(SHAPE, drawn, None, np.random.default_rng(seed)) for seed in range(200)]

    for values, low, high in (
        ([look.degrees for look in looks], -30, 30),
        ([look.noise_hu for look in looks], 3, 9),
        ([look.shift_hu for look in looks], -7, 7),
        ([look.gain for look in looks], 0.9, 1.1),
        ([np.log2(120 / 48 / look.step[0]) for look in looks], -1, 1),
    ):
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high >= max(values) > high - 0.1 * (high - low)
        assert abs(np.mean(values) - (low + high) / 2) < 0.1 * (high - low)
    assert 70 < sum(look.flip for look in looks) < 130
    assert not any(slice_look(SHAPE, config(), None, np.random.default_rng(seed)).flip for seed in range(20))
