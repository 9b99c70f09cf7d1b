"""A run that is cut and resumed is the run that never was cut; a checkpoint is whole or not there."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.lecl.checkpoint import WrongCheckpoint, check_same_run, latest, load, save
from tests.pretraining import StopAfter, ToyPretraining, ToyViews, toy_config, toy_run

TIMES = {"images_per_s", "data_wait_share"}


def figures(folder):
    """metrics.csv without what the clock decides."""
    with (folder / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def same(left, right):
    """To the last bit, tensors included."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (0, 2), (1, 1)])
def test_a_run_cut_and_resumed_is_the_same_run_to_the_last_bit(tmp_path, workers, accumulate):
    keys = {"steps": 7, "workers": workers, "accumulate": accumulate}
    straight = toy_run(toy_config(tmp_path / "straight", **keys))
    cut = [toy_run(toy_config(tmp_path / "cut", **keys), stop=StopAfter(3))]  # between two rows of the metrics
    torch.rand(5)  # what else the process does to the generator
    cut.append(toy_run(toy_config(tmp_path / "cut", **keys), stop=StopAfter(1)))
    cut.append(toy_run(toy_config(tmp_path / "cut", **keys)))

    assert [each.steps for each in cut] == [3, 4, 7]
    assert [each.finished for each in cut] == [False, False, True]
    left, right = load(straight.checkpoint), load(cut[-1].checkpoint)
    del left["facts"], right["facts"]  # they name the folders
    assert same(left, right)
    assert figures(tmp_path / "cut") == figures(tmp_path / "straight")
    assert straight.losses == cut[-1].losses


def test_a_killed_run_loses_the_rows_after_its_last_checkpoint(tmp_path):
    config = toy_config(tmp_path / "killed", checkpoint_every=3)
    toy_run(config, stop=StopAfter(3))
    rows = (tmp_path / "killed/metrics.csv").read_text()
    with (tmp_path / "killed/metrics.csv").open("a") as file:
        file.write(rows.splitlines()[-1].replace("2,", "4,", 1) + "\n6,0.0")  # the last one cut short

    toy_run(config)

    toy_run(toy_config(tmp_path / "straight", checkpoint_every=3))
    assert figures(tmp_path / "killed") == figures(tmp_path / "straight")


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    config = toy_config(tmp_path)
    first = toy_run(config)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    again = toy_run(config)

    assert (again.steps, again.finished, again.checkpoint) == (first.steps, True, first.checkpoint)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_the_last_two_checkpoints_are_kept(tmp_path):
    toy_run(toy_config(tmp_path, checkpoint_every=1))

    names = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert names == ["checkpoint-000000005.pt", "checkpoint-000000006.pt"]
    assert latest(tmp_path).name == names[-1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"learning_rate": 1e-3}, "run.learning_rate: found 0.01, expected 0.001"),
        ({"batch": 2}, "run.batch: found 4, expected 2"),
        ({"seed": 1}, "run.seed: found 0, expected 1"),
    ],
)
def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, changed, said):
    toy_run(toy_config(tmp_path), stop=StopAfter(2))

    with pytest.raises(WrongCheckpoint, match=said):
        toy_run(toy_config(tmp_path, **changed))


def test_a_checkpoint_on_other_slices_is_refused(tmp_path):
    toy_run(toy_config(tmp_path), stop=StopAfter(2))

    with pytest.raises(WrongCheckpoint, match="slices: found 10, expected 12"):
        toy_run(toy_config(tmp_path), views=ToyViews(12))


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    toy_run(toy_config(tmp_path), stop=StopAfter(2))

    with pytest.raises(WrongCheckpoint, match=r"backbone.stem.weight found \(16, 1, 3, 3\), expected \(8, 1, 3, 3\)"):
        toy_run(toy_config(tmp_path), ToyPretraining(channels=8))


def test_where_and_how_often_may_change_when_a_run_is_resumed(tmp_path):
    toy_run(toy_config(tmp_path), stop=StopAfter(2))

    assert toy_run(toy_config(tmp_path, checkpoint_every=7, log_every=3, workers=1)).finished


def test_facts_in_lists_are_compared_without_paths():
    there = {"data": {"sources": [{"kind": "archive", "path": "/a"}, {"kind": "deeplesion", "split": "train"}]}}
    here = {"data": {"sources": [{"kind": "archive", "path": "/b"}, {"kind": "deeplesion", "split": "val"}]}}

    check_same_run(Path("a.pt"), there, there | {"data": there["data"] | {"cache": "/c"}})
    with pytest.raises(WrongCheckpoint, match=r'data.sources.split \(2\): found "train", expected "val"$'):
        check_same_run(Path("a.pt"), there, here)


def test_an_unreadable_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint-000000001.pt").write_bytes(b"PK\x03\x04 cut short")

    with pytest.raises(WrongCheckpoint, match=r"checkpoint-000000001\.pt is not a readable checkpoint"):
        toy_run(toy_config(tmp_path))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    torch.save({"step": Bomb()}, tmp_path / "checkpoint-000000001.pt")

    with pytest.raises(WrongCheckpoint):
        load(tmp_path / "checkpoint-000000001.pt")
    assert not (tmp_path / "was here").exists()


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from models.lecl.checkpoint import CannotSave, save

folder = Path(sys.argv[1])
save(folder, 1, {"weights": torch.zeros(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes of a file: writing stops in its middle
try:
    save(folder, 2, {"weights": torch.zeros(100_000)})
except CannotSave as error:
    print(error)
"""


def test_a_disk_that_fills_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    assert "checkpoint of 40" in answer.stdout  # 400,000 bytes and what torch puts around them
    assert "bytes not written" in answer.stdout
    assert "are free; checkpoint-000000001.pt is as it was" in answer.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000001.pt"]
    assert torch.equal(load(tmp_path / "checkpoint-000000001.pt")["weights"], torch.zeros(1000))


def test_what_a_killed_process_left_is_cleared_away(tmp_path):
    (tmp_path / ".checkpoint-000000001.pt.writing").write_bytes(b"half")

    save(tmp_path, 2, {})

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000002.pt"]
