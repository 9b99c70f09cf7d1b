import itertools

import cv2
import numpy as np
import pytest
from synthetic import random_hu, write_slice

from models.ct.decode import read_hu
from models.ct.reasons import Reason
from models.ct.screening import SetAside
from models.ct.series import read_slices
from models.ct.slices import encoder_input, prepare_slice
from models.ct.windows import ABDOMEN, LUNG, apply_window

WINDOWS = (ABDOMEN, LUNG)


def block_mean(image, factor):
    """Area averaging by a whole factor, one output pixel at a time."""
    rows, columns = (length // factor for length in image.shape)
    mean = np.empty((rows, columns))
    for row, column in itertools.product(range(rows), range(columns)):
        mean[row, column] = image[row * factor : (row + 1) * factor, column * factor : (column + 1) * factor].mean(
            dtype=np.float64
        )
    return mean


@pytest.mark.parametrize(("source", "size"), [(448, 224), (96, 32), (32, 32)])
def test_encoder_input_is_the_area_mean_of_each_window(source, size):
    hu = random_hu(1, source)[0]

    prepared = encoder_input(hu, WINDOWS, size)

    expected = [block_mean(apply_window(hu, window), source // size) for window in WINDOWS]
    assert (prepared.shape, prepared.dtype) == ((2, size, size), np.float32)
    np.testing.assert_allclose(prepared, expected, atol=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(512, 512), (300, 417), (225, 1024), (96, 97)])
def test_the_area_mean_is_opencvs(rows, columns):
    hu = np.random.default_rng(0).integers(-1024, 2000, (rows, columns)).astype(np.float32)
    size = min(96, rows)

    prepared = encoder_input(hu, WINDOWS, size)

    expected = [cv2.resize(apply_window(hu, window), (size, size), interpolation=cv2.INTER_AREA) for window in WINDOWS]
    np.testing.assert_allclose(prepared, expected, atol=2e-6)


def test_a_slice_is_windowed_before_it_is_resized():
    hu = np.array([[-1024, 3000], [-1024, 3000]], dtype=np.float32)

    # half the pixels are black and half are white; the mean HU, 988, would be all white
    assert encoder_input(hu, (ABDOMEN,), 1).tolist() == [[[0.5]]]


def test_a_smaller_slice_than_the_network_wants_is_enlarged_within_0_and_1():
    prepared = encoder_input(random_hu(1, 32)[0], WINDOWS, 96)

    assert prepared.shape == (2, 96, 96)
    assert 0 <= prepared.min() < prepared.max() <= 1


def test_preparing_a_file_is_decoding_windowing_and_resizing(tmp_path):
    path = write_slice(tmp_path)
    out = np.zeros((2, 16, 16), np.float32)

    said = prepare_slice(path, out, WINDOWS, 16)

    assert said == read_slices(path)[0]
    np.testing.assert_array_equal(out, encoder_input(read_hu(path), WINDOWS, 16))


def test_a_file_that_is_no_slice_says_the_same_as_its_header(tmp_path):
    no_ct = write_slice(tmp_path, lambda dataset: setattr(dataset, "Modality", "MR"))
    no_dicom = tmp_path / "notes.txt"
    no_dicom.write_text("nothing to see")

    for path in (no_ct, no_dicom):
        assert isinstance(read_slices(path)[0], SetAside)
        assert prepare_slice(path, np.zeros((2, 16, 16), np.float32), WINDOWS, 16) == read_slices(path)[0]


def test_a_file_cut_short_is_set_aside_as_undecodable(tmp_path):
    path = write_slice(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])

    said = prepare_slice(path, np.zeros((2, 16, 16), np.float32), WINDOWS, 16)

    assert isinstance(said, SetAside)
    assert said.reason == Reason.UNDECODABLE
