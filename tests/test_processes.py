import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from synthetic import random_hu, write_ct, write_slice

from models.ct.processes import Processes, Slots
from models.ct.reasons import Reason
from models.ct.screening import SetAside
from models.ct.slices import prepare_slice
from models.ct.windows import ABDOMEN, LUNG

WINDOWS = (ABDOMEN, LUNG)
PREPARE = partial(prepare_slice, windows=WINDOWS, size=16)


@pytest.fixture
def slots():
    return Slots(12, (2, 16, 16))


@contextlib.contextmanager
def opened(*arguments):
    processes = Processes(*arguments)
    yield processes
    processes.close()


def children() -> set[psutil.Process]:
    return {each for each in psutil.Process().children() if "spawn_main" in " ".join(each.cmdline())}


def kill_when_told(item: str, out: np.ndarray) -> str:
    """Dies as often as the item's file has bytes, one less each time."""
    path = Path(item)
    if left := path.read_bytes():
        path.write_bytes(left[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    out[:] = 7
    return "alive"


def sleep(item: float, _out: np.ndarray) -> str:
    time.sleep(item)
    return "awake"


def test_every_item_is_prepared_in_the_slot_it_was_given(tmp_path, slots):
    paths = write_ct(tmp_path, random_hu(slices=12))
    paths[4].write_bytes(paths[4].read_bytes()[:-100])
    with opened(2, PREPARE, slots, 20.0) as processes:
        work = [(path, slot) for slot, path in enumerate(paths)]
        shares = [processes.submit(work[first : first + 3]) for first in range(0, 12, 3)]
        said = [answer for share in shares for answer in share.result()]

    expected = np.zeros((12, 2, 16, 16), np.float32)
    assert said == [PREPARE(path, out) for path, out in zip(paths, expected, strict=True)]
    assert [k for k in range(12) if isinstance(said[k], SetAside)] == [4]
    good = np.arange(12) != 4
    np.testing.assert_array_equal(slots.array()[good], expected[good])


def test_a_process_killed_once_costs_nothing(tmp_path, slots):
    fuse = tmp_path / "fuse"
    fuse.write_bytes(b"1")
    with opened(1, kill_when_told, slots, 20.0) as processes:
        assert processes.submit([(str(fuse), 3)]).result() == ["alive"]
    assert slots.array()[3].min() == 7


def test_an_item_that_takes_its_process_down_twice_is_set_aside_and_its_neighbours_are_not(tmp_path, slots):
    fuse, harmless = tmp_path / "fuse", tmp_path / "harmless"
    fuse.write_bytes(b"123")
    harmless.touch()
    with opened(1, kill_when_told, slots, 20.0) as processes:
        before, bad, after = processes.submit([(str(harmless), 0), (str(fuse), 1), (str(harmless), 2)]).result()

    assert isinstance(bad, SetAside)
    assert (bad.reason, fuse.read_bytes()) == (Reason.UNDECODABLE, b"3")
    assert (before, after) == ("alive", "alive")
    assert [slot.max() for slot in slots.array()[:3]] == [7, 0, 7]


def test_a_silent_process_is_killed(slots):
    before = children()
    with opened(1, sleep, slots, 0.5) as processes:
        assert processes.submit([(0.0, 0)]).result() == ["awake"]
        (first,) = children() - before

        (said,) = processes.submit([(60.0, 0)]).result()

        assert isinstance(said, SetAside)
        assert "silent for 0 s" in said.detail or "silent for 1 s" in said.detail
        assert not first.is_running()
    assert children() == before


def test_a_file_that_cannot_be_read_is_an_error_and_the_process_lives_on(tmp_path, slots):
    with opened(1, PREPARE, slots, 20.0) as processes:
        work = [(tmp_path / "missing.dcm", 0), (write_slice(tmp_path), 1)]
        (error, said), before = processes.submit(work).result(), children()
        processes.submit(work).result()

        assert isinstance(error, FileNotFoundError)
        assert str(tmp_path) not in str(error)
        assert said.rows == 32
        assert children() == before


def never(item: str, out: np.ndarray) -> str:
    raise AssertionError("never reached")


def test_that_no_process_starts_is_no_items_fault(slots, monkeypatch):
    monkeypatch.setattr("models.ct.processes._serve", print)  # a process that ends at once
    with opened(1, never, slots, 20.0) as processes, pytest.raises(OSError, match="no decoding process"):
        processes.submit([("item", 0)]).result()


ORPHAN = """
import multiprocessing, os, signal, sys
from functools import partial
from pathlib import Path
from models.ct.processes import Processes, Slots
from models.ct.slices import prepare_slice
from models.ct.windows import LUNG

if __name__ == "__main__":
    processes = Processes(1, partial(prepare_slice, windows=(LUNG,), size=16), Slots(1, (1, 16, 16)), 20.0)
    processes.submit([(Path(sys.argv[1]), 0)]).result()
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
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(int(note.read_text()))
        try:
            process.wait(timeout=10)
        finally:
            process.kill()
