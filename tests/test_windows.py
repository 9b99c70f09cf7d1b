import numpy as np
import pytest

from models.ct.windows import ABDOMEN, LUNG, WINDOWS, Window, apply_window


@pytest.mark.parametrize(
    ("window", "hu", "expected"),
    [
        # abdomen: 450 HU wide, so 1 HU is 1/450 above -175
        (ABDOMEN, [[-1024, -175, -62.5], [50, 275, 3071]], [[0, 0, 0.25], [0.5, 1, 1]]),
        # lung: 2000 HU wide, so 1 HU is 1/2000 above -1500
        (LUNG, [[-3024, -1500, -1000], [-500, 500, 501]], [[0, 0, 0.25], [0.5, 1, 1]]),
        (Window("narrow", low=10, high=14), [[9, 10, 11], [12, 13, 14]], [[0, 0, 0.25], [0.5, 0.75, 1]]),
    ],
)
def test_a_window_maps_its_low_to_0_and_its_high_to_1_and_clips_outside(window, hu, expected):
    shown = apply_window(np.array(hu, dtype=np.float32), window)

    assert shown.dtype == np.float32
    np.testing.assert_allclose(shown, expected, atol=1e-6)
    assert (shown.min(), shown.max()) == (0.0, 1.0)


def test_applying_a_window_leaves_the_hu_as_they_were():
    hu = np.array([[-2000.0, 40.0, 2000.0]], dtype=np.float32)

    apply_window(hu, ABDOMEN)

    assert hu.tolist() == [[-2000.0, 40.0, 2000.0]]


def test_the_windows_are_those_of_the_paper_and_of_volumes_under_their_own_names():
    assert {name: (window.name, window.low, window.high) for name, window in WINDOWS.items()} == {
        "abdomen": ("abdomen", -175.0, 275.0),
        "lung": ("lung", -1500.0, 500.0),
        "wide": ("wide", -1000.0, 1000.0),
    }
