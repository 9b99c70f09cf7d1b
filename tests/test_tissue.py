"""The map of tissues: on painted slices, on the phantom and on real CT."""

import numpy as np
import pytest
from scipy import ndimage

from models.ct.decode import read_hu
from models.ct.phantom import chest
from models.lecl.tissue import Tissue, tissues

AIR, LUNG, FAT, MUSCLE, CORTEX = -1000.0, -850.0, -100.0, 50.0, 700.0  # HU
SIZE, STEP_MM = 160, 2.0
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE] * STEP_MM  # mm


def disc(row_mm, column_mm, radius_mm):
    return np.hypot(ROWS - row_mm, COLUMNS - column_mm) < radius_mm


def body(*parts):
    """A disc of muscle in air, 200 mm wide, and other discs of these HU in it: (HU, row, column, radius in mm)."""
    hu = np.where(disc(160, 160, 100), MUSCLE, AIR)
    for value, row, column, radius in parts:
        hu[disc(row, column, radius)] = value
    return hu.astype(np.float32)


def at(hu, row_mm, column_mm, spacing_mm=(STEP_MM, STEP_MM)):
    return Tissue(tissues(hu, spacing_mm)[round(row_mm / spacing_mm[0]), round(column_mm / spacing_mm[1])])


@pytest.mark.parametrize(
    ("hu", "tissue"),
    [(LUNG, Tissue.LUNG), (FAT, Tissue.FAT), (MUSCLE, Tissue.SOFT), (CORTEX, Tissue.BONE)],
)
def test_a_part_of_the_body_is_the_tissue_of_its_hu(hu, tissue):
    painted = body((hu, 150, 150, 30))

    assert at(painted, 150, 150) == tissue
    assert at(painted, 220, 160) == Tissue.SOFT


def test_a_heart_full_of_contrast_agent_is_no_bone_and_a_rib_is():
    assert at(body((300, 150, 150, 30)), 150, 150) == Tissue.SOFT
    assert at(body((300, 150, 150, 6)), 150, 150) == Tissue.BONE
    vertebra = body((300, 150, 150, 20))
    vertebra[disc(150, 150, 20) & (ROWS // 8 % 2 == 0)] = 600  # trabecles
    assert at(vertebra, 150, 150) == Tissue.BONE


def test_bowel_that_holds_more_than_gas_is_no_lung():
    hu = body((AIR, 150, 150, 30))
    hu[disc(150, 150, 30) & (ROWS > 150)] = -700

    assert at(hu, 170, 150) == at(hu, 130, 150) == Tissue.OUTSIDE


def test_lungs_that_the_edge_of_the_picture_cuts_are_lung_and_the_air_beyond_the_skin_is_not():
    whole = body((LUNG, 160, 110, 35), (LUNG, 160, 210, 35))
    cut = whole[:, 45:]  # 90 mm: in the right lung

    assert at(whole, 160, 110) == at(cut, 160, 20) == at(cut, 160, 120) == Tissue.LUNG
    assert at(cut, 50, 20) == at(cut, 160, 225) == Tissue.OUTSIDE


def test_marrow_within_cortex_is_bone_and_soft_tissue_is_not():
    assert at(body((CORTEX, 150, 150, 10), (MUSCLE, 150, 150, 5)), 150, 150) == Tissue.BONE
    assert at(body((FAT, 150, 150, 8), (MUSCLE, 150, 150, 6)), 150, 150) == Tissue.SOFT


def test_a_vessel_belongs_to_the_lung_around_it_and_the_heart_does_not():
    assert at(body((LUNG, 150, 150, 50), (MUSCLE, 150, 150, 4)), 150, 150) == Tissue.LUNG
    assert at(body((LUNG, 150, 150, 60), (MUSCLE, 150, 150, 30)), 150, 150) == Tissue.SOFT


def test_gas_and_small_aerated_parts_are_no_lung():
    assert at(body((AIR, 150, 150, 30)), 150, 150) == Tissue.OUTSIDE
    assert at(body((LUNG, 150, 150, 10)), 150, 150) == Tissue.OUTSIDE


def test_skin_and_the_rim_of_the_lung_are_no_place_for_a_lesion():
    hu = body((LUNG, 160, 160, 50))

    assert at(hu, 64, 160) == Tissue.OUTSIDE  # 4 mm deep
    assert at(hu, 110, 160) == Tissue.OUTSIDE  # the last pixel before the lung
    assert at(hu, 85, 160) == Tissue.SOFT


def test_a_mattress_below_the_patient_is_no_lung():
    hu = body()
    hu[(ROWS > 230) & (ROWS < 290) & (hu == AIR)] = -650

    assert not (tissues(hu, (STEP_MM, STEP_MM)) == Tissue.LUNG).any()
    assert at(hu, 280, 100) == Tissue.OUTSIDE


def test_couch_arm_and_air_are_outside():
    hu = body()
    hu[(ROWS > 270) & (ROWS < 280) & (COLUMNS > 20) & (COLUMNS < 300)] = FAT  # 10 mm below the patient
    hu[disc(40, 280, 30)] = MUSCLE
    labels = tissues(hu, (STEP_MM, STEP_MM))

    assert (labels[~disc(160, 160, 100)] == Tissue.OUTSIDE).all()
    assert (labels[disc(160, 160, 90)] == Tissue.SOFT).all()


@pytest.mark.parametrize("value", [-1000, -3024, -400])
def test_a_slice_without_a_patient_is_outside_everywhere(value):
    assert not tissues(np.full((48, 64), value, np.int16), (1.0, 1.0)).any()


def test_the_map_is_of_mm_and_not_of_pixels():
    hu = body((LUNG, 150, 150, 50), (CORTEX, 220, 160, 12))
    whole = tissues(hu, (STEP_MM, STEP_MM))

    stretched = tissues(np.repeat(hu, 3, axis=1), (STEP_MM, STEP_MM / 3))

    assert stretched.shape == (SIZE, 3 * SIZE)
    assert (stretched[:, 1::3] == whole).mean() > 0.99


def test_noise_does_not_change_the_map():
    hu = body((LUNG, 150, 110, 40), (CORTEX, 220, 160, 14), (FAT, 150, 210, 25))
    noise = np.random.default_rng(0).normal(0, 45, hu.shape)

    changed = tissues(hu + noise, (STEP_MM, STEP_MM)) != tissues(hu, (STEP_MM, STEP_MM))

    assert changed.mean() < 0.003
    assert tissues((hu + noise).astype(np.int16), (STEP_MM, STEP_MM)).dtype == np.uint8


def aerated(hu, pixel_mm2):
    """The filled body and its lungs by another way: aerated parts of 10 cm2 and more, vessels left out."""
    regions, _ = ndimage.label(ndimage.binary_opening(hu > -300, iterations=3))
    inside = ndimage.binary_fill_holes(regions == np.bincount(regions.ravel())[1:].argmax() + 1)
    parts, count = ndimage.label(ndimage.binary_opening(inside & (hu < -600), iterations=2))
    areas = np.bincount(parts.ravel(), minlength=count + 1) * pixel_mm2
    return inside, np.isin(parts, [part for part in range(1, count + 1) if areas[part] > 1000])


@pytest.mark.parametrize("seed", range(3))
def test_the_phantoms_lungs_are_lung_and_the_air_around_it_is_outside(seed):
    phantom = chest(seed, lesion=False, slices=3, size=256)
    for hu in phantom.hu:
        labels = tissues(hu, phantom.spacing_mm[1:])
        inside, lungs = aerated(hu, np.prod(phantom.spacing_mm[1:]))

        assert (labels[lungs] == Tissue.LUNG).mean() > 0.97
        assert (hu[labels == Tissue.LUNG] < -500).mean() > 0.8  # vessels are the rest
        assert not labels[~ndimage.binary_dilation(inside, iterations=2)].any()
        assert (labels == Tissue.SOFT).sum() > 0.3 * inside.sum() > 10 * (labels == Tissue.BONE).sum() > 0


def test_real_lungs_are_lung_and_air_and_couch_are_outside(lidc_0001):
    for number, lung in {0: True, 24: True, 60: True, 90: False}.items():  # the last one is of the abdomen
        hu = read_hu(lidc_0001[number])
        labels = tissues(hu, (0.703125, 0.703125))
        inside, lungs = aerated(hu, 0.703125**2)
        far = ~ndimage.binary_dilation(inside, iterations=6)

        assert (labels == Tissue.LUNG).any() == lungs.any() == lung
        assert not lung or (labels[lungs] == Tissue.LUNG).mean() > 0.97
        assert (labels[~ndimage.binary_dilation(lungs, iterations=10)] == Tissue.LUNG).sum() < 200
        assert (far & (hu > -500)).sum() > 1500  # the couch
        assert not labels[far].any()
        for tissue, (low, high) in {Tissue.FAT: (-150, -40), Tissue.SOFT: (-15, 180)}.items():
            assert low < np.median(hu[labels == tissue]) < high
            assert (labels == tissue).mean() > 0.03
