"""`keyslice pretrain`, from DICOM to an encoder that the service lists."""

import pytest
import torch
from typer.testing import CliRunner

from models.ct.phantom import Identity, chest, write_series
from models.lecl import train
from models.zoo import encoders
from service.cli import app

RUN = """
[data]
description = "Synthetic chests."
[[data.sources]]
kind = "archive"
path = "{folder}/ct"
[encoder]
base = "test_mambaout"
start = "random"
name = "pretrained_here"
[views]
size = 96
[objectives]
planting = 1
[run]
output = "{folder}/run"
steps = 4
batch = 2
workers = 0
"""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path, monkeypatch, one_thread):
    """With six slices of a synthetic chest, a run over them, and weights of the service's own."""
    phantom = chest(seed=0, lesion=False, slices=6, size=64)
    write_series(tmp_path / "ct", phantom.hu, phantom.spacing_mm, Identity("synthetic patient"))
    (tmp_path / "run.toml").write_text(RUN.format(folder=tmp_path))
    monkeypatch.setenv("KEYSLICE_WEIGHTS_DIR", str(tmp_path / "weights"))
    return tmp_path


def pretrain(folder, *arguments):
    return CliRunner().invoke(app, ["pretrain", "--config", str(folder / "run.toml"), *arguments])


def test_a_run_in_two_pieces_ends_in_an_encoder_that_the_service_lists(folder):
    assert pretrain(folder, "--max-minutes", "0").exit_code == 0
    assert [path.name for path in (folder / "run").glob("*.pt")] == ["checkpoint-000000001.pt"]
    assert "pretrained_here" not in encoders(folder / "weights")

    answer = pretrain(folder)

    assert answer.exit_code == 0, answer.output
    spec = encoders(folder / "weights")["pretrained_here"]
    assert (spec.network, spec.input_size, spec.dim) == ("test_mambaout", 96, 64)
    card = (folder / "weights/pretrained_here/MODEL_CARD.md").read_text()
    assert "Synthetic chests. 6 slices of 1 patients; left out: nobody." in card
    assert "4 steps" in card
    assert f"keyslice pretrain --config {folder / 'run.toml'}" in card


def test_a_name_on_the_command_line_exports_what_there_is(folder):
    answer = pretrain(folder, "--max-minutes", "0", "--export", "early", "--output", str(folder / "elsewhere"))

    assert answer.exit_code == 0, answer.output
    assert "early" in encoders(folder / "weights")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("objective", "made"), [("planting", False), ("moco", True), ("lecl", True)])
def test_second_views_are_made_only_where_they_are_contrasted(folder, monkeypatch, objective, made):
    objectives = f"{objective} = 1\nprojector_hidden = 8"
    (folder / "run.toml").write_text((folder / "run.toml").read_text().replace("planting = 1", objectives))
    seen, collate = [], train.collate
    monkeypatch.setattr(train, "collate", lambda samples: seen.extend(samples) or collate(samples))

    assert pretrain(folder, "--max-minutes", "0").exit_code == 0

    assert len(seen) == 2
    assert {sample.other is not sample.view for sample in seen} == {made}


def test_fresh_begins_anew(folder):
    pretrain(folder)

    assert pretrain(folder, "--fresh", "--max-minutes", "0").exit_code == 0

    assert [path.name for path in (folder / "run").glob("*.pt")] == ["checkpoint-000000001.pt"]
    assert (folder / "run/metrics.csv").read_text().count("\n") == 1  # no row yet


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("steps = 4", "steeps = 4"), "run.toml: run.steeps: no such key"),
        (('"test_mambaout"', '"resnet"'), "no encoder 'resnet', expected one of"),
        (('"random"', '"pretrained"'), "test_mambaout: no weights on this machine"),
        (('"pretrained_here"', '"Mine!"'), "an encoder cannot be named 'Mine!'"),
        (("workers = 0", "workers = -1"), "run.workers: input should be greater than or equal to 0, found -1"),
        (("/ct", "/nowhere"), "expected"),
        (("[encoder]", "boxes = 'none.csv'\n[encoder]"), "none.csv"),
        (("description", 'leave_out_patients = ["0000000000000000"]\ndescription'), "1 of 1 patients to leave out"),
        (("description", "folds = 2\nfold = 0\ndescription"), "1 patients for 2 folds"),
        (('/run"', '/run.toml"'), "File exists"),
    ],
)
def test_a_run_that_cannot_be_says_why_and_exits_with_2(folder, change, said):
    (folder / "run.toml").write_text((folder / "run.toml").read_text().replace(*change))

    answer = pretrain(folder)

    assert answer.exit_code == 2, answer.output
    assert said in answer.output.replace("\n", " ")
    assert "Traceback" not in answer.output
    assert isinstance(answer.exception, SystemExit)


def test_a_run_of_another_configuration_is_not_resumed(folder):
    pretrain(folder, "--max-minutes", "0")
    (folder / "run.toml").write_text(RUN.format(folder=folder).replace("batch = 2", "batch = 3"))

    answer = pretrain(folder)

    assert answer.exit_code == 2
    assert "run.batch: found 2, expected 3" in answer.output


def test_help_has_an_example():
    answer = CliRunner().invoke(app, ["pretrain", "--help"])

    assert "Example: keyslice pretrain --config run.toml" in answer.output
