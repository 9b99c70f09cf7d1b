"""Synthetic lesions and decoys: how large, how dense, where, and what stays as it was."""

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy import ndimage

from models.ct.phantom import chest
from models.lecl.lesions import ALIKE, DIAMETER_MM, KINDS, decoy, plant
from models.lecl.tissue import Tissue, tissues

LEVELS = {Tissue.LUNG: -850.0, Tissue.FAT: -100.0, Tissue.SOFT: 45.0, Tissue.BONE: 400.0}  # HU
KIND = {kind.name: kind for kind in KINDS}
UNEVEN = 45.0  # HU that a lesion's mean may lie off its level: its texture's blobs are not even
FINE, COARSE = (1.0, 1.0, 1.0), (2.5, 2.5, 2.5)  # mm


def flat(tissue, shape, noise=10.0):
    """Nothing but one tissue with noise that is correlated over about a pixel, and its map."""
    white = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(each, (0, 0), 0.6) for each in white])
    return LEVELS[tissue] + smooth * (noise / smooth.std()), np.full(shape[1:], tissue, np.uint8)


def put_in(edit, before):
    """HU of what was blended in, by the blend solved for it; NaN where nothing was."""
    share = np.where(edit.mask > 1e-3, edit.mask, np.nan)
    return before + (edit.hu - before) / share


def cut(body):
    """Whether a body ends at the volume's border."""
    return any(body.take(end, axis).any() for axis in range(3) for end in (0, -1))


@dataclass(frozen=True)
class Seen:
    """What a test wants of a lesion that was planted in flat tissue."""

    kind: str
    diameter_mm: float
    measured_mm: float  # of the ball of its volume; NaN where the volume's border cut it
    hu: np.ndarray  # of what was put in, where the mask is above a half
    change: np.ndarray  # from what was there
    depth: np.ndarray  # from the surface, 1 at the deepest

    @property
    def core_over_rim(self):
        return self.hu[self.depth > 0.8].mean() - self.hu[self.depth < 0.3].mean()


def seen(edit, before, spacing_mm):
    body = edit.mask > 0.5
    depth = ndimage.distance_transform_edt(body)
    measured = np.nan if cut(body) else (6 * body.sum() * np.prod(spacing_mm) / np.pi) ** (1 / 3)
    hu = put_in(edit, before)
    return Seen(edit.kind, edit.diameter_mm, measured, hu[body], (hu - before)[body], (depth / depth.max())[body])


def many(shape, spacing_mm, diameter_mm):
    found = []
    for tissue in LEVELS:
        hu, labels = flat(tissue, shape)
        for seed in range(70 if tissue in (Tissue.LUNG, Tissue.SOFT) else 24):
            edit = plant(hu, spacing_mm, np.random.default_rng([tissue, seed]), diameter_mm, labels)
            if edit:
                found.append(seen(edit, hu, spacing_mm))
    return found


@pytest.fixture(scope="module")
def small():
    return many((26, 36, 36), FINE, (4, 10))


@pytest.fixture(scope="module")
def large():
    return many((26, 44, 44), COARSE, (10, 40))


@pytest.fixture(scope="module")
def distinct():
    """Lesions whose middle and rim are pixels apart."""
    return many((24, 40, 40), (1.5, 1.5, 1.5), (16, 24))


@pytest.fixture(scope="module")
def phantoms():
    """Single slices of chests, the mm between their rows and columns."""
    chests = [chest(seed, lesion=False, slices=3, size=192) for seed in range(6)]
    return [(each.hu[1:2], each.spacing_mm) for each in chests]


def test_there_are_lesions_of_lung_soft_tissue_bone_and_nodes_and_each_is_drawn(small):
    assert {each.kind for each in small} == set(KIND)
    assert len(KIND) == len(KINDS)
    for tissue, names in {
        Tissue.LUNG: ("solid", "part-solid", "ground-glass", "spiculated"),
        Tissue.SOFT: ("hypodense", "hyperdense", "rim-enhancing", "calcified"),
        Tissue.BONE: ("lytic", "sclerotic"),
        Tissue.FAT: ("node",),
    }.items():
        assert set(names) <= {kind.name.removesuffix(" lesion").removesuffix(" nodule") for kind in KINDS
                              if kind.tissue == tissue}  # fmt: skip


def test_the_documentation_lists_every_kind_with_its_hu():
    page = (Path(__file__).parents[1] / "docs" / "pretraining.md").read_text()

    for kind in KINDS:
        level = "+ " * kind.relative + "{} to {}".format(*kind.density) + ", specks" * kind.calcium
        core = "+ " * kind.core_relative + "{} to {}".format(*kind.core) if kind.core else ""
        place = "soft tissue" if kind.tissue == Tissue.SOFT else kind.tissue.name.lower()
        most = f"{kind.largest_mm} mm" if kind.largest_mm < DIAMETER_MM[1] else ""
        assert " ".join(f"| {kind.name} | {place} | {level} | {core} | {most} |".split()) in page


def test_a_lesion_of_each_kind_is_as_large_as_it_says(small, large):
    for kind in KINDS:
        whole = [each for each in small + large if each.kind == kind.name and not np.isnan(each.measured_mm)]
        ratios = [each.measured_mm / each.diameter_mm for each in whole]

        assert len(ratios) >= 4
        assert 0.93 < np.median(ratios) < 1.08
        assert 0.85 < min(ratios) <= max(ratios) < 1.3
        assert all(DIAMETER_MM[0] <= each.diameter_mm <= kind.largest_mm <= DIAMETER_MM[1] for each in whole)


def test_sizes_reach_from_4_to_40_mm_and_small_ones_are_as_frequent_as_in_a_logarithm():
    hu, labels = flat(Tissue.SOFT, (1, 80, 80))
    drawn = [plant(hu, FINE, np.random.default_rng(seed), labels=labels).diameter_mm for seed in range(400)]

    assert min(drawn) < 4.5
    assert max(drawn) > 36
    assert 10 < np.median(drawn) < 16  # their geometric mean is 12.6


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not kind.core and not kind.calcium], ids=lambda kind: kind.name
)
def test_a_plain_lesion_is_as_dense_as_its_kind(kind, small, large):
    low, high = kind.density
    for each in small + large:
        if each.kind == kind.name:
            assert low - UNEVEN < (each.change if kind.relative else each.hu).mean() < high + UNEVEN


def test_lesions_stand_out_from_their_tissue_in_the_direction_of_their_name(large):
    signs = {"lytic": -1, "sclerotic": 1, "hypodense": -1, "hyperdense": 1, "cyst": -1, "node": 1, "solid": 1}
    for each in large:
        sign = signs.get(each.kind.split()[0])
        assert sign is None or sign * each.change.mean() > 0


@pytest.mark.parametrize(
    ("kind", "low", "high"),  # HU between the middle and the rim
    [
        ("part-solid nodule", 150, 900),
        ("rim-enhancing lesion", -230, -40),
        ("target lesion", 30, 210),
        ("necrotic node", -160, 0),
        ("solid nodule", -UNEVEN, UNEVEN),
        ("ground-glass nodule", -UNEVEN, UNEVEN),
        ("hypodense lesion", -UNEVEN, UNEVEN),
    ],
)
def test_a_core_differs_from_its_rim_as_its_kind_says(kind, low, high, distinct):
    differences = [each.core_over_rim for each in distinct if each.kind == kind]

    assert len(differences) >= 5
    assert low < min(differences) <= max(differences) < high


def test_part_solid_halos_are_ground_glass_and_their_cores_are_solid(distinct):
    nodules = [each for each in distinct if each.kind == "part-solid nodule"]

    assert max(each.hu[each.depth < 0.3].mean() for each in nodules) < -250
    assert -100 < np.median([each.hu[each.depth > 0.85].mean() for each in nodules]) < 80


def test_calcium_is_specks_and_only_where_a_kind_has_it(distinct):
    bright = {}
    for each in distinct:
        if KIND[each.kind].tissue in (Tissue.LUNG, Tissue.SOFT):
            bright.setdefault(each.kind, []).append((each.hu > 300).mean())

    for name, shares in bright.items():
        if KIND[name].calcium:
            assert np.mean(np.array(shares) > 0) > 0.5  # it may be faint
            assert max(shares) < 0.5
        else:
            assert max(shares) == 0


@pytest.mark.parametrize("tissue", LEVELS, ids=lambda tissue: tissue.name)
def test_a_lesion_that_replaces_tissue_is_as_noisy_as_what_is_around_it(tissue):
    for noise in (12.0, 30.0):  # HU
        hu, labels = flat(tissue, (1, 90, 90), noise)
        around = fluctuation(hu[0])
        ratios = []
        for seed in range(80):
            edit = plant(hu, (1, 0.75, 0.75), np.random.default_rng(seed), (15, 30), labels)
            kind = KIND[edit.kind]
            inner = cv2.erode((edit.mask[0] > 0.9).astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
            if not kind.relative and not kind.core and not kind.calcium and inner.sum() > 60:
                texture = put_in(edit, hu)[0]
                texture[np.isnan(texture)] = texture[inner].mean()
                ratios.append(fluctuation(texture)[inner].std() / around.std())

        assert len(ratios) >= 8
        assert 0.85 < np.median(ratios) < 1.2
        assert 0.6 < min(ratios) <= max(ratios) < 1.6


def fluctuation(hu):
    """HU without what is smooth over pixels."""
    return hu - cv2.GaussianBlur(hu, (0, 0), 1.5)


def test_a_lesion_lies_in_several_slices_and_is_largest_in_the_middle_of_them():
    hu, labels = flat(Tissue.SOFT, (30, 56, 56))
    found = 0
    for seed in range(40):
        body = plant(hu, (2.0, 1.5, 1.5), np.random.default_rng(seed), (12, 30), labels).mask > 0.5
        if cut(body):
            continue
        areas = body.sum(axis=(1, 2))
        held = np.flatnonzero(areas)
        found += 1

        assert (np.diff(held) == 1).all()
        assert len(held) >= 4
        assert max(areas[held[0]], areas[held[-1]]) < 0.8 * areas.max()
        assert abs(areas.argmax() - (held[0] + held[-1]) / 2) < 0.3 * len(held)
        assert all((body[k] & body[k + 1]).any() for k in held[:-1])
    assert found >= 8


def test_a_lesion_is_as_wide_in_mm_along_slices_rows_and_columns():
    hu, labels = flat(Tissue.SOFT, (24, 72, 48))
    spacing_mm, widths = (3.0, 1.0, 1.5), []
    for seed in range(60):
        edit = plant(hu, spacing_mm, np.random.default_rng(seed), (12, 24), labels)
        body = edit.mask > 0.5
        if not cut(body):
            pixels = [body.any(axis=others).sum() for others in ((1, 2), (0, 2), (0, 1))]
            widths.append(np.multiply(pixels, spacing_mm) / edit.diameter_mm)

    assert len(widths) >= 12
    assert (np.abs(np.median(widths, axis=0) - 1.13) < 0.2).all()


def test_a_lesion_that_would_lie_between_two_slices_is_none():
    hu, labels = flat(Tissue.SOFT, (4, 40, 40))
    edits = [plant(hu, (12.0, 1.0, 1.0), np.random.default_rng(seed), (4, 5), labels) for seed in range(40)]

    assert 0.2 < np.mean([edit is None for edit in edits]) < 0.9
    assert all((edit.mask > 0.5).any() for edit in edits if edit)


@pytest.mark.parametrize("edit_of", [plant, decoy])
def test_nothing_outside_the_mask_changes_and_nothing_of_the_input(edit_of, phantoms):
    for hu, spacing_mm in phantoms:
        before = hu.copy()
        edit = next(filter(None, (edit_of(hu, spacing_mm, np.random.default_rng(seed)) for seed in range(9))))

        np.testing.assert_array_equal(hu, before)
        untouched = edit.mask == 0
        assert untouched.mean() > 0.5
        np.testing.assert_array_equal(edit.hu[untouched], before[untouched])
        assert np.abs(edit.hu - before)[edit.mask < 1e-4].max() < 1
        assert 0 <= edit.mask.min() < 0.5 < edit.mask.max() <= 1
        body = edit.mask > 0.5
        assert edit.contrast_hu == pytest.approx((edit.hu - before)[body].mean(), abs=0.01)


def test_a_lesion_lies_in_the_tissue_of_its_kind_and_one_of_the_lung_stays_in_it(phantoms):
    seen_kinds = set()
    for number, (hu, spacing_mm) in enumerate(phantoms):
        labels = tissues(hu[0], spacing_mm[1:])
        lung = ndimage.binary_dilation(labels == Tissue.LUNG, iterations=2)
        for seed in range(15):
            edit = plant(hu, spacing_mm, np.random.default_rng([number, seed]))
            kind, body = KIND[edit.kind], edit.mask[0] > 0.5
            seen_kinds.add(kind.tissue)

            assert (labels[body] == kind.tissue).mean() > 0.35
            if kind.tissue == Tissue.LUNG:
                assert (labels[body] == Tissue.LUNG).mean() > 0.97
                assert edit.mask[0][~lung].max() < 0.05
    assert {Tissue.LUNG, Tissue.SOFT} <= seen_kinds


@pytest.mark.parametrize("edit_of", [plant, decoy])
def test_no_tissue_takes_no_edit(edit_of):
    random = np.random.default_rng(0)
    little = np.zeros((64, 64), np.uint8)
    little[20:30, 20:30] = Tissue.SOFT  # 100 mm2

    assert edit_of(np.full((3, 64, 64), -1000, np.int16), FINE, random) is None
    assert edit_of(np.zeros((1, 64, 64), np.int16), FINE, random, labels=little) is None


def test_a_decoy_is_tissue_of_another_place_of_the_same_slice(phantoms):
    found = 0
    for number, (hu, spacing_mm) in enumerate(phantoms):
        labels = tissues(hu[0], spacing_mm[1:])
        for seed in range(8):
            edit = decoy(hu, spacing_mm, np.random.default_rng([number, seed]))
            if edit is None:
                continue
            found += 1
            moved, body = put_in(edit, hu)[0], edit.mask[0] > 0.5
            rows, columns = np.nonzero(body)
            starts = np.argwhere(np.abs(hu[0] - moved[rows[0], columns[0]]) < 0.01)
            places = [(row - rows[0] + rows, column - columns[0] + columns) for row, column in starts]
            places = [at for at in places if np.max(at) < len(labels) and np.min(at) >= 0]
            [there] = [at for at in places if np.abs(hu[0][at] - moved[body]).max() < 0.01]

            assert there[0][0] != rows[0] or there[1][0] != columns[0]
    assert found >= 30


@pytest.mark.parametrize("tissue", LEVELS, ids=lambda tissue: tissue.name)
def test_a_decoys_mean_is_nearly_that_of_what_was_there(tissue):
    hu, labels = flat(tissue, (1, 96, 96))
    blobs = cv2.GaussianBlur(np.random.default_rng(1).normal(size=(96, 96)), (0, 0), 12)
    hu[0] += blobs * (3 * ALIKE[tissue] / blobs.std())  # so that most places differ by more
    edits = [decoy(hu, FINE, np.random.default_rng(seed), (4, 16), labels) for seed in range(60)]
    changes = [(put_in(edit, hu) - hu)[edit.mask > 0.5] for edit in edits if edit]

    assert len(changes) > 40
    assert 0.5 * ALIKE[tissue] < max(abs(change.mean()) for change in changes) < ALIKE[tissue]
    assert abs(np.mean([change.mean() for change in changes])) < 0.25 * ALIKE[tissue]


def test_a_decoy_needs_a_second_place_of_the_same_mean():
    rows, columns = np.mgrid[:64, :64]
    steep = (6400.0 * rows + 100.0 * columns)[None].astype(np.float32)  # HU; no two places are alike

    for seed in range(20):
        assert decoy(steep, FINE, np.random.default_rng(seed), labels=np.full((64, 64), Tissue.SOFT, np.uint8)) is None


def test_decoys_are_as_large_as_lesions():
    hu, labels = flat(Tissue.SOFT, (1, 120, 120))
    sizes = {
        edit_of: [np.sqrt(each.mask.sum()) for each in edits if each]
        for edit_of in (plant, decoy)
        for edits in [[edit_of(hu, FINE, np.random.default_rng(seed), labels=labels) for seed in range(120)]]
    }

    assert len(sizes[decoy]) > 0.95 * len(sizes[plant])
    for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
        lesion, none = (np.quantile(sizes[edit_of], quantile) for edit_of in (plant, decoy))
        assert 0.85 < none / lesion < 1.18


def test_decoys_have_edges_as_sharp_and_as_faint_as_lesions():
    hu, labels = flat(Tissue.SOFT, (1, 120, 120))
    for edit_of in (plant, decoy):
        edits = [edit_of(hu, FINE, np.random.default_rng(seed), (10, 30), labels) for seed in range(60)]
        steepest = [np.hypot(*np.gradient(each.mask[0])).max() for each in edits if each]  # per mm

        assert 0.15 < min(steepest) < 0.25
        assert 0.6 < max(steepest) < 1.1


def digest():
    """A hash of a lesion's and a decoy's bytes in a phantom, over several slices."""
    phantom = chest(3, lesion=False, slices=6, size=96)
    hashed = hashlib.sha256()
    for seed in range(4):
        for edit_of in (plant, decoy):
            edit = edit_of(phantom.hu, phantom.spacing_mm, np.random.default_rng(seed))
            hashed.update(edit.hu.tobytes() + edit.mask.tobytes() + edit.kind.encode() if edit else b"none")
    return hashed.hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_another_process():
    here = Path(__file__).parent
    other = subprocess.run(
        [sys.executable, "-c", "import test_lesions; print(test_lesions.digest())"],
        env=os.environ | {"PYTHONPATH": f"{here}:{here.parent}", "PYTHONHASHSEED": "7"},
        check=True,
        capture_output=True,
        text=True,
    )

    assert digest() == digest() == other.stdout.strip()


def test_whole_numbers_of_hu_and_a_given_map_give_the_same_lesion(phantoms):
    hu, spacing_mm = phantoms[0]
    whole = np.round(hu)
    labels = tissues(whole[0], spacing_mm[1:])
    one = plant(whole, spacing_mm, np.random.default_rng(5))

    for other in (
        plant(whole.astype(np.int16), spacing_mm, np.random.default_rng(5)),
        plant(whole, spacing_mm, np.random.default_rng(5), labels=labels),
    ):
        np.testing.assert_array_equal(other.hu, one.hu)
    assert plant(whole, spacing_mm, np.random.default_rng(6)).hu.tobytes() != one.hu.tobytes()
