"""Lesions of the unseen recipe: where they lie, what is said of them, and that the recipe stays apart."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest

from bench.nodules import transplant
from bench.patients import Nodule, read_volumes
from bench.shapes import correlated, edged, solid, textured
from bench.tissue import find_tissue
from bench.unseen import CONSPICUOUS_HU, CONSPICUOUS_MM, KINDS, plant_unseen
from models.ct.phantom import chest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def patient():
    """A synthetic chest on a couch, 10 mm slices; its HU, spacing and tissue."""
    phantom = chest(seed=1, lesion=False, slices=20, size=160)
    hu = phantom.hu.copy()
    hu[:, 150:154, 10:150] = 300  # the couch
    return hu, phantom.spacing_mm, find_tissue(hu, phantom.spacing_mm)


@pytest.fixture(scope="module")
def lesions(patient):
    hu, spacing, tissue = patient
    found = [plant_unseen(hu, spacing, np.random.default_rng(seed), tissue=tissue) for seed in range(60)]
    return [each for each in found if each]


def test_tissue_is_found_from_hu_alone(patient):
    hu, _, tissue = patient

    lung = tissue.lung & (hu < -700)
    assert hu[lung].size > 0.9 * (hu[tissue.body] < -700).sum()
    assert not tissue.body[:, 150:154].any()  # neither couch nor what lies beyond
    assert hu[tissue.soft].mean() == pytest.approx(45, abs=30)
    assert not (tissue.lung & tissue.soft).any()


def test_a_gas_filled_bowel_is_no_lung(patient):
    hu, spacing, tissue = patient
    filled = hu.copy()
    filled[tissue.lung] = -1000.0

    assert not find_tissue(filled, spacing).lung.any()


def test_the_same_generator_plants_the_same_lesion(patient):
    hu, spacing, tissue = patient
    first, second = (plant_unseen(hu, spacing, np.random.default_rng(7), tissue=tissue) for _ in range(2))

    np.testing.assert_array_equal(first.hu, second.hu)
    assert (first.slices, first.kind, first.diameter_mm) == (second.slices, second.kind, second.diameter_mm)


def test_only_the_slices_that_are_named_change(patient, lesions):
    hu, _, _ = patient
    for lesion in lesions:
        differs = [k for k in range(len(hu)) if not np.array_equal(lesion.hu[k], hu[k])]

        assert differs == list(lesion.changed)
        assert set(lesion.slices) <= set(lesion.changed)
        assert not lesion.mask[[k for k in range(len(hu)) if k not in differs]].any()


def test_lesions_lie_in_the_tissue_of_their_kind(patient, lesions):
    _, _, tissue = patient
    assert {lesion.kind.partition("_")[0] for lesion in lesions} >= {"lung", "soft"}
    for lesion in lesions:
        own = getattr(tissue, KINDS[lesion.kind][0])

        assert (own & lesion.mask).sum() > 0.6 * lesion.mask.sum()
        assert not (lesion.mask & ~tissue.body).any()


def test_the_diameter_is_the_longest_line_in_one_slice(patient, lesions):
    _, spacing, _ = patient
    for lesion in lesions[:12]:
        longest = 0.0
        for k in lesion.slices:
            pixels = np.argwhere(lesion.mask[k])
            for row, column in pixels:
                for other_row, other_column in pixels:
                    apart = np.hypot((row - other_row) * spacing[1], (column - other_column) * spacing[2])
                    longest = max(longest, apart + spacing[1])

        assert lesion.diameter_mm == pytest.approx(longest, rel=1e-3)


def test_conspicuous_is_ten_millimetres_and_solid_in_lung_or_sixty_hu_elsewhere(lesions):
    assert {lesion.conspicuous for lesion in lesions} == {True, False}
    for lesion in lesions:
        striking = lesion.kind == "lung_solid"
        if not lesion.kind.startswith("lung"):
            striking = abs(lesion.contrast_hu) >= CONSPICUOUS_HU

        assert lesion.conspicuous == (lesion.diameter_mm >= CONSPICUOUS_MM and striking)
        assert 4.0 <= lesion.diameter_mm <= 40.0


def test_a_volume_of_air_takes_no_lesion():
    air = np.full((20, 64, 64), -1000.0, np.float32)

    assert plant_unseen(air, (5.0, 1.0, 1.0), np.random.default_rng(0)) is None
    assert transplant(air, (5.0, 1.0, 1.0), ball(), np.random.default_rng(0)) is None


def test_a_transplanted_nodule_keeps_its_hu_and_its_volume(patient):
    hu, spacing, tissue = patient
    nodule = ball()
    volume = nodule.mask.sum() * np.prod(nodule.spacing_mm)
    found = transplant(hu, spacing, nodule, np.random.default_rng(3), tissue)

    assert found.conspicuous
    assert found.kind == "lung_real"
    assert found.mask.sum() * np.prod(spacing) == pytest.approx(volume, rel=0.3)
    assert np.median(found.hu[found.mask]) == pytest.approx(40.0, abs=3)


def ball() -> Nodule:
    """24 mm of 40 HU in lung of -850 HU, with 2 mm slices."""
    z, y, x = np.meshgrid(*(np.arange(-18, 19, step) for step in (2.0, 0.8, 0.8)), indexing="ij")
    mask = z**2 + y**2 + x**2 < 12**2
    return Nodule("another", np.where(mask, 40.0, -850.0).astype(np.float32), mask, (2.0, 0.8, 0.8))


def test_a_real_nodule_is_where_half_of_the_readers_saw_it(data, lidc_0001, tmp_path):
    (tmp_path / "lidc-idri-0001").symlink_to(data / "lidc-idri-0001")
    unpacked = tmp_path / "unpacked" / "lidc-idri-0001"
    unpacked.mkdir(parents=True)
    for path in lidc_0001:
        (unpacked / path.name).symlink_to(path)
    said = json.loads((data / "lidc-idri-0001" / "annotations.json").read_text())["annotations"]
    heights = [{contour["z"] for contour in reader["contours"]} for reader in said]

    (series,) = read_volumes(tmp_path, tmp_path / "unpacked")

    seen_by = [sum(z in reader for reader in heights) for z in series.z_mm]
    assert series.nodule_slices == tuple(k for k, readers in enumerate(seen_by) if readers >= 2)
    assert series.suspect_slices == tuple(k for k in range(1, 132) if max(seen_by[k - 1 : k + 2]) >= 1)
    assert np.median(series.nodule.hu[series.nodule.mask]) > -50  # it is solid
    first, last = series.nodule_slices[0], series.nodule_slices[-1]
    assert series.nodule.hu.shape[0] == last - first + 1 + 4


@pytest.mark.parametrize("seed", range(8))
def test_shapes_edges_and_textures_are_well_formed(seed):
    random = np.random.default_rng(seed)
    points = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 31)] * 3, indexing="ij"), axis=-1).astype(np.float32)
    inside = solid(points, random)
    texture = textured((6, 20, 20), random)
    share = edged(np.linspace(-8, 8, 33, dtype=np.float32).reshape(1, 3, 11), 8.0, random)

    assert 0.005 < inside.mean() < 0.5
    assert not (inside & (np.abs(points).max(axis=-1) > 1.45)).any()
    assert (texture.mean(), texture.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))
    assert share.ravel()[0] < 0.2
    assert share.ravel()[-1] == 1.0
    assert correlated((4, 8), 2.0, random).shape == (4, 8)


def test_the_recipe_knows_no_training_and_no_product_knows_the_bench():
    def imported(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
        return names | {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}

    recipe = [ROOT / "bench" / f"{name}.py" for name in ("unseen", "shapes", "painting", "tissue", "nodules")]
    product = [path for folder in ("models", "service", "workers") for path in (ROOT / folder).rglob("*.py")]

    assert not {name for path in recipe for name in imported(path) if name.startswith("models")}
    assert not {path.name for path in product if any(f"{name}.".startswith("bench.") for name in imported(path))}
