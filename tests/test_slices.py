import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import psutil
import pytest
from synthetic import random_hu, write_ct, write_slice

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.slices import READ_AHEAD, SlicePreparer, encoder_input, prepare_slice
from models.ct.windows import ABDOMEN, LUNG, apply_window

WINDOWS = (ABDOMEN, LUNG)


@pytest.fixture
def preparer():
    opened = SlicePreparer(1)
    yield opened
    opened.close()


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

    np.testing.assert_array_equal(prepare_slice(path, WINDOWS, 16), encoder_input(read_hu(path), WINDOWS, 16))


def test_slices_prepared_in_processes_keep_their_order_and_a_bad_one_does_not_stop_them(tmp_path):
    paths = write_ct(tmp_path, random_hu(slices=12))
    paths[4].write_bytes(paths[4].read_bytes()[:-100])
    preparer = SlicePreparer(2)

    prepared = list(preparer.prepare(paths, WINDOWS, 16))
    preparer.close()

    assert isinstance(prepared[4], UndecodableSlice)
    assert str(prepared[4]) == str(prepare_slice(paths[4], WINDOWS, 16))
    good = [k for k in range(12) if k != 4]
    np.testing.assert_array_equal([prepared[k] for k in good], [prepare_slice(paths[k], WINDOWS, 16) for k in good])


def test_slices_are_read_only_so_far_ahead(tmp_path, preparer):
    path = write_slice(tmp_path)
    asked = []

    prepared = preparer.prepare((asked.append(k) or path for k in range(1000)), WINDOWS, 16)
    next(prepared)
    assert len(asked) == READ_AHEAD
    next(prepared)
    assert len(asked) == READ_AHEAD + 1


def test_a_killed_process_breaks_one_call_and_the_next_has_a_new_one(tmp_path, preparer):
    path = write_slice(tmp_path)
    before = set(multiprocessing.active_children())
    prepared = preparer.prepare([path] * 1000, WINDOWS, 16)
    first = next(prepared)
    (process,) = set(multiprocessing.active_children()) - before

    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        list(prepared)
    again = list(preparer.prepare([path] * 3, WINDOWS, 16))

    np.testing.assert_array_equal(again, [first] * 3)


ORPHAN = """
import multiprocessing, os, signal, sys
from pathlib import Path
from models.ct.slices import SlicePreparer
from models.ct.windows import LUNG

if __name__ == "__main__":
    list(SlicePreparer(1).prepare([Path(sys.argv[1])], (LUNG,), 16))
    Path(sys.argv[2]).write_text(str(multiprocessing.active_children()[0].pid))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_parent_leaves_no_process_behind(tmp_path):
    script, note = tmp_path / "orphan.py", tmp_path / "pid"
    script.write_text(ORPHAN)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, script, write_slice(tmp_path / "ct"), note]
    parent = subprocess.run(command, env=environment, timeout=60, check=False)

    assert parent.returncode == -signal.SIGKILL
    orphan = int(note.read_text())
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(orphan)
        try:
            process.wait(timeout=10)
        finally:
            process.kill()
