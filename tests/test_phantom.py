import numpy as np
import pytest
from synthetic import SPACING, random_hu

from models.ct.decode import read_hu
from models.ct.phantom import Identity, chest, write_series
from models.ct.reasons import UID
from models.ct.series import Status, Verdict, read_series

SMALL = {"slices": 12, "size": 64}


def test_a_written_series_is_read_back_with_its_hu_and_geometry(tmp_path):
    hu, identity = random_hu(slices=5), Identity("p")

    paths = write_series(tmp_path / "series", hu, SPACING, identity)

    series = read_series(paths)
    assert series.verdict() == Verdict(Status.ACCEPTED, ())
    assert [each.path for each in series.slices] == paths
    assert [each.z_mm for each in series.slices] == [0, 5, 10, 15, 20]
    assert series.slices[0].pixel_spacing_mm == SPACING[1:]
    np.testing.assert_array_equal([read_hu(path) for path in paths], hu)


def test_the_same_chest_comes_of_the_same_seed_and_another_of_another():
    first, again, another = (chest(seed, lesion=True, **SMALL) for seed in (1, 1, 2))

    np.testing.assert_array_equal(again.hu, first.hu)
    assert (again.spacing_mm, again.lesion_slices) == (first.spacing_mm, first.lesion_slices)
    assert np.abs(another.hu - first.hu).mean() > 20  # HU


def test_a_chest_holds_air_lung_soft_tissue_and_bone():
    hu = chest(0, lesion=False, **SMALL).hu

    assert (hu.shape, hu.dtype) == ((12, 64, 64), np.float32)
    assert -1024 <= hu.min() < -950
    assert 400 < hu.max() <= 3071
    lung, soft = np.mean((hu > -920) & (hu < -800)), np.mean((hu > -20) & (hu < 110))
    assert lung > 0.03
    assert soft > 0.08


@pytest.mark.parametrize("seed", range(6))
def test_a_lesion_lies_in_the_slices_it_is_said_to_and_nowhere_else(seed):
    healthy, ill = chest(seed, lesion=False, **SMALL), chest(seed, lesion=True, **SMALL)

    # the noise differs by some 25 HU; a mass in the lung by several hundred
    grown = ((ill.hu - healthy.hu) > 250).any(axis=(1, 2))
    assert healthy.lesion_slices == ()
    assert set(np.flatnonzero(grown)) <= set(ill.lesion_slices)
    assert 3 <= len(ill.lesion_slices) <= 7  # 36 to 56 mm, 10 mm slices
    assert ill.lesion_slices == tuple(range(ill.lesion_slices[0], ill.lesion_slices[-1] + 1))
    assert grown[ill.lesion_slices[len(ill.lesion_slices) // 2]]


def test_a_patient_has_the_same_uids_every_time_and_everything_else_has_others():
    one = Identity("p")
    uids = [
        one.series_uid,
        one.study_uid,
        one.uid("slice", "1", "1", "0"),
        one.uid("slice", "1", "1", "1"),
        Identity("p", series="2").series_uid,
        Identity("p", study="2").series_uid,
        Identity("p", study="2").study_uid,
        Identity("q").series_uid,
        Identity("q").study_uid,
    ]

    assert Identity("p") == one
    assert Identity("p", series="2").study_uid == one.study_uid
    assert len(set(uids)) == len(uids)
    assert all(UID.fullmatch(uid) for uid in uids)
