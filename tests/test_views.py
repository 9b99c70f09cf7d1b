"""What a training step sees of a slice: the same for the same key, the mask and the flag true of the picture."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from models.ct.phantom import chest
from models.ct.windows import ABDOMEN, LUNG, apply_window
from models.lecl.config import ViewConfig
from models.lecl.sources import Box, CTImage
from models.lecl.views import Sample, Views, collate, edited

SIZE = 128
PLAIN = {"scale": (1, 1), "flip": False, "rotate_degrees": 0, "noise_hu": (0, 0), "shift_hu": 0, "gain": 0}
PICTURES = ("view", "healthy", "mask", "other")
BOTH = (ABDOMEN, LUNG)
KEYS = [(index, draw) for draw in range(20) for index in range(3)]


class Chests:
    """Three slices of phantoms, with these boxes on each."""

    patients = ("a", "b", "c")

    def __init__(self, boxes=()):
        made = [chest(seed, lesion=False, slices=3, size=192) for seed in range(len(self.patients))]
        self.images = [CTImage(np.round(each.hu[1]).astype(np.int16), each.spacing_mm[1:], boxes) for each in made]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class Painted:
    """One slice of fat with one annotated square of bone."""

    patients = ("a",)
    box = Box(70, 40, 79, 49)

    def __len__(self):
        return 1

    def __getitem__(self, index):
        hu = np.full((128, 128), -170, np.int16)
        hu[40:50, 70:80] = 275
        return CTImage(hu, (2.0, 2.0), (self.box,))


@pytest.fixture(scope="module")
def chests():
    return Chests()


def config(**changes):
    return ViewConfig(**({"size": SIZE} | changes))


def same(one, other):
    return one.lesion == other.lesion and all(
        getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in PICTURES
    )


def test_a_key_gives_the_same_sample_whoever_asks_and_when(chests):
    views = Views(chests, config(lesion_crop=True), seed=3)
    first = {key: views[key] for key in KEYS[:12]}

    assert all(same(views[key], first[key]) for key in reversed(KEYS[:12]))
    assert all(same(Views(Chests(), config(lesion_crop=True), seed=3)[key], first[key]) for key in KEYS[:4])
    assert len({each.view.tobytes() for each in first.values()}) == len(first)
    assert not any(same(Views(chests, config(lesion_crop=True), seed=4)[key], first[key]) for key in KEYS[:4])


def test_worker_processes_give_the_samples_that_one_process_gives(chests):
    views = Views(chests, config(lesion_crop=True), seed=1)
    # Not forked: what ran before in this process may have left OpenCV with threads (models/lecl/train.py).
    loader = DataLoader(
        views, batch_size=4, sampler=KEYS[:16], num_workers=2, collate_fn=collate, multiprocessing_context="spawn"
    )

    for start, batch in enumerate(loader):
        here = collate([views[key] for key in KEYS[4 * start : 4 * start + 4]])
        for each in fields(batch):
            assert torch.equal(getattr(batch, each.name), getattr(here, each.name))


@pytest.mark.parametrize(("lesions", "hidden"), [(1, 0), (3, 0.06)])  # among several one may be too faint to be masked
def test_the_healthy_view_differs_from_the_view_under_the_mask_and_nowhere_else(chests, lesions, hidden):
    views = Views(chests, config(plant=1, lesions=lesions, windows=["wide"]), seed=0, contrast=False)
    samples = [views[key] for key in KEYS]

    for sample in samples:
        change = np.abs(sample.view - sample.healthy)
        assert change[sample.mask == 0].max() <= hidden
        assert sample.mask.max() <= 0.9 or change[sample.mask > 0.9].mean() > 0.02
    assert sum(sample.mask.max() > 0.9 for sample in samples) > 0.35 * len(samples)


def test_the_flag_says_that_the_mask_has_more_than_half_a_pixel_of_lesion(chests):
    for changes in ({"plant": 0.5}, {"plant": 0.5, "crop": 32}, {"plant": 0.0}):
        views = Views(chests, config(**changes), seed=2, contrast=False)
        samples = [views[key] for key in KEYS]

        assert all(sample.lesion == (sample.mask.max() > 0.5) for sample in samples)
        assert isinstance(samples[0].lesion, bool)
        lesions = sum(sample.lesion for sample in samples)
        assert 0.2 * len(KEYS) < lesions < 0.6 * len(KEYS) if changes["plant"] else lesions == 0


def test_the_shares_of_slices_with_lesion_and_decoy_are_those_of_the_configuration(chests):
    for plant, decoy in ((0.3, 0.0), (0.0, 0.6), (1.0, 1.0), (0.0, 0.0)):
        edits = [
            edited(image, config(plant=plant, decoy=decoy), np.random.default_rng([seed, 9]))
            for seed in range(30)
            for image in chests.images
        ]
        originals = [image.hu for _ in range(30) for image in chests.images]
        planted = np.mean([bool(edit.masks) for edit in edits])
        deceived = np.mean([(edit.healthy != hu).any() for edit, hu in zip(edits, originals, strict=True)])

        assert plant - 0.15 <= planted <= min(plant + 0.15, 2 * plant)
        assert decoy - 0.2 <= deceived <= min(decoy + 0.15, 2 * decoy)  # a decoy may find no place
        for edit in edits:
            assert edit.masks or edit.hu is edit.healthy or (edit.hu == edit.healthy).all()
            outside = np.all([mask == 0 for mask in edit.masks], axis=0) if edit.masks else np.ones(edit.hu.shape, bool)
            np.testing.assert_array_equal(edit.hu[outside], edit.healthy[outside])


def test_up_to_so_many_lesions_as_the_configuration_says(chests):
    edits = [
        edited(chests.images[seed % 3], config(plant=1, lesions=3), np.random.default_rng(seed)) for seed in range(40)
    ]

    assert {len(edit.masks) for edit in edits} == {1, 2, 3}


def planted(chests, settings, seed):
    """(key, how much its lesion changes each pixel of it at the abdomen and at the lung window) of those with one."""
    for key in KEYS:
        edit = edited(chests[key[0]], settings, np.random.default_rng((seed, *key)))
        for body in (mask > 0.5 for mask in edit.masks):
            changes = [apply_window(edit.hu[body], each) - apply_window(edit.healthy[body], each) for each in BOTH]
            yield key, *map(np.abs, changes)


@pytest.mark.parametrize("which", [0, 1], ids=["abdomen", "lung"])
def test_a_lesion_that_does_not_show_at_a_window_is_none(chests, which):
    settings = config(plant=1, decoy=0, windows=[BOTH[which].name])
    views = Views(chests, settings, seed=0, contrast=False)
    shown = []
    for key, *changes in planted(chests, settings, seed=0):
        sample, change = views[key], changes[which].mean()
        if change < 0.028:
            assert not sample.lesion
            assert not sample.mask.any()
            np.testing.assert_array_equal(sample.healthy, sample.view)
        elif change > 0.032 and sample.mask.max() > 0.5:
            assert sample.lesion
            assert (sample.healthy != sample.view).any()
        shown.append(sample.lesion)
    assert 0.05 * len(shown) < sum(shown) < 0.95 * len(shown)


def test_ground_glass_is_no_lesion_at_the_abdomen_window_and_is_one_at_the_lungs(chests):
    settings = config(plant=1, decoy=0, windows=["abdomen"])
    abdomen = Views(chests, settings, seed=5, contrast=False)
    lung = Views(chests, config(plant=1, decoy=0, windows=["lung"]), seed=5, contrast=False)
    glass = [key for key, at_abdomen, _ in planted(chests, settings, seed=5) if at_abdomen.max() == 0]

    assert len(glass) >= 3
    assert not any(abdomen[key].lesion or abdomen[key].mask.any() for key in glass)
    assert sum(lung[key].lesion for key in glass) >= len(glass) - 1  # one may be too small for the view


def test_most_lesions_are_shown_at_the_window_that_shows_them_best(chests):
    settings = config(plant=1, decoy=0, **PLAIN)
    views = Views(chests, settings, seed=0, contrast=False)
    best = [
        (views[key].view[2, 2] > 0) == (at_lung.mean() > at_abdomen.mean())  # air is black at the abdomen window only
        for key, at_abdomen, at_lung in planted(chests, settings, seed=0)
    ]

    assert 0.8 < np.mean(best) < 1  # 0.8, and half of the rest


def test_an_annotated_box_is_a_lesion_where_it_is_in_the_view():
    views = Views(Painted(), config(size=64, crop=32, plant=0, decoy=0, windows=["abdomen"], **PLAIN), seed=0)
    samples = [views[0, draw] for draw in range(120)]

    for sample in samples:
        rows, columns = np.nonzero(sample.view > 0.5)
        off = max(abs(rows.mean() - 15.5), abs(columns.mean() - 15.5)) if len(rows) else 16  # px from the middle
        assert off < 14.5 if sample.lesion else off > 13
        assert not sample.mask.any()
        np.testing.assert_array_equal(sample.healthy, sample.view)
    assert 0.8 < np.mean([sample.lesion for sample in samples]) < 1


def test_an_annotated_box_is_a_lesion_at_every_window_of_the_whole_slice():
    for window in ("abdomen", "lung", "wide"):
        views = Views(Painted(), config(plant=0, windows=[window]), seed=0)
        assert all(views[0, draw].lesion for draw in range(5))


def test_the_second_view_of_a_lesion_is_centred_on_it_where_lecl_asks_for_it():
    square = {"size": 64, "plant": 0, "decoy": 0, "windows": ["abdomen"]} | PLAIN
    rows, columns = np.mgrid[:64, :64] - 31.5
    for lesion_crop, largest in ((True, 0.2), (False, 1.0)):
        views = Views(Painted(), config(**square, lesion_crop=lesion_crop), seed=0)
        off = []
        for draw in range(30):
            bright = views[0, draw].other > 0.5
            off.append(np.hypot((rows * bright).sum(), (columns * bright).sum()) / max(1, bright.sum()) / 64)
            share = bright.mean()  # of the picture: a square of 10 px in 24 to 30 px, or in 128
            assert 0.08 < share < 0.22 if lesion_crop else share < 0.02

        assert max(off) < largest + 0.05
        assert lesion_crop or min(off) > 0.05


def test_the_second_view_looks_elsewhere_and_without_contrast_there_is_none(chests):
    for key in KEYS[:6]:
        both = Views(chests, config(), seed=0)[key]
        one = Views(chests, config(), seed=0, contrast=False)[key]

        assert one.other.tobytes() == one.view.tobytes() == both.view.tobytes()
        assert np.abs(both.other - both.view).mean() > 0.005


def test_without_restoring_nobody_makes_the_healthy_view_and_the_rest_is_the_same(chests):
    for key in KEYS[:6]:
        both = Views(chests, config(plant=1), seed=0)[key]
        one = Views(chests, config(plant=1), seed=0, restore=False)[key]

        assert one.healthy.tobytes() == one.view.tobytes() == both.view.tobytes()
        assert one.other.tobytes() == both.other.tobytes()
        assert one.mask.tobytes() == both.mask.tobytes()


def test_a_slice_of_air_has_no_lesion_and_no_end():
    class Air:
        patients = ("a",)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return CTImage(np.full((40, 60), -1000, np.int16), (1.0, 1.0))

    views = Views(Air(), config(plant=1, decoy=1), seed=0)

    assert len(views) == 1
    assert not any(views[0, draw].lesion or views[0, draw].mask.any() for draw in range(4))


def test_views_leave_the_slice_as_it_was(chests):
    before = [image.hu.copy() for image in chests.images]
    views = Views(chests, config(plant=1, decoy=1), seed=0)

    for key in KEYS[:12]:
        assert views[key].view.shape == (SIZE, SIZE)

    for image, kept in zip(chests.images, before, strict=True):
        np.testing.assert_array_equal(image.hu, kept)


def test_a_batch_is_its_samples_side_by_side_on_any_device():
    random = np.random.default_rng(0)
    samples = [Sample(*random.random((4, 8, 8), np.float32), lesion=bool(k % 2)) for k in range(3)]

    batch = collate(samples)

    assert len(batch) == 3
    for name in PICTURES:
        pictures = getattr(batch, name)
        assert (pictures.shape, pictures.dtype) == ((3, 1, 8, 8), torch.float32)
        for one, sample in zip(pictures, samples, strict=True):
            np.testing.assert_array_equal(one[0], getattr(sample, name))
    assert (batch.lesion.tolist(), batch.lesion.dtype) == ([False, True, False], torch.bool)
    elsewhere = batch.to(torch.device("meta"))
    assert {getattr(elsewhere, each.name).device.type for each in fields(batch)} == {"meta"}
    assert batch.to(torch.device("cpu")).view.equal(batch.view)
