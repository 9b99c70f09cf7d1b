"""What a pretraining run is told, in which order it sees slices, and what it says of itself."""

import csv
import math
import os
import re
import signal
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import multiprocessing

from models.lecl.checkpoint import WrongCheckpoint, latest, load
from models.lecl.clock import Clock, Reading
from models.lecl.config import BadConfig, Config, RunConfig, read_config
from models.lecl.order import Order, Parts
from models.lecl.ranks import joined
from models.lecl.stop import Stop
from models.lecl.training import Diverged, learning_rate
from models.lecl.watch import WINDOW, Watch
from tests.pretraining import StopAfter, ToyPretraining, ToyViews, toy_config, toy_run

CONFIGS = Path(__file__).resolve().parent.parent / "models/lecl/configs"
MINIMAL = """
[[data.sources]]
kind = "archive"
path = "ct"
[encoder]
base = "mambaout_femto"
[objectives]
planting = 1
[run]
output = "out"
steps = 10
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("name", "batch"), [("mambaout_tiny", 2048), ("vmamba_tiny", 2048), ("vit_conv_base", 1024)])
def test_the_papers_runs_have_the_papers_numbers(name, batch):
    config = read_config(CONFIGS / f"{name}.toml")

    run = config.run
    assert (run.batch, run.epochs, run.learning_rate, run.warmup_epochs) == (batch, 100, 1e-4, 10)
    assert config.objectives.weights == {"lecl": 1.0}
    assert (config.encoder.base, config.encoder.start) == (name, "random")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_can_be_read(path):
    assert read_config(path).objectives.weights


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("steps = 10", "steps = 10\nsteeps = 3"), "run.steeps: no such key"),
        (("base = ", "bass = "), "encoder.base: not given"),
        (("steps = 10", 'steps = "ten"'), "run.steps: .*found 'ten'"),
        (("steps = 10", "epochs = 1\nsteps = 10"), "run: expected either steps or epochs"),
        (("steps = 10", "steps = 10\nbatch = 6\naccumulate = 4"), "run: batch 6 is no multiple of accumulate 4"),
        (("steps = 10", "steps = 10\nwarmup_steps = 1\nwarmup_epochs = 1"), "run: found warmup_steps and"),
        (("planting = 1", "planting = 0"), "objectives: every objective has weight 0"),
        (("planting = 1", "planting = nan"), "objectives.planting: .*finite"),
        (("planting = 1", 'planting = 1\n[views]\nwindows = ["bone"]'), "views.windows.0: no window 'bone'"),
        (("planting = 1", "planting = 1\n[views]\nscale = [2, 1]"), "views.scale: found 2 to 1, expected the lower"),
        (("planting = 1", "planting = 1\n[views]\ncrop = 448"), "views: crop of 448 px, expected at most size, 224"),
        (("archive", "zip"), "data.sources.0: .*'deeplesion', 'archive'"),
        (('"ct"', '"ct"\nsplit = "val"'), "data.sources.0.split: no such key"),
        (("[encoder]", "[data]\nfolds = 3\n[encoder]"), "data: folds and fold come together"),
        (("[encoder]", "[data]\nfolds = 3\nfold = 3\n[encoder]"), "data: fold 3 of 3, expected"),
        (("[run]", "[run"), "line"),
    ],
)
def test_a_configuration_that_is_wrong_is_told_by_its_key(tmp_path, change, said):
    text = MINIMAL.replace(*change)
    if "[data]" in text:  # TOML wants a table before the tables in it
        head, tail = text.split("[data]\n")
        keys, rest = tail.split("[encoder]")
        text = f"[data]\n{keys}{head}[encoder]{rest}"
    (tmp_path / "run.toml").write_text(text)

    with pytest.raises(BadConfig, match=said):
        read_config(tmp_path / "run.toml")


def test_a_configuration_that_is_not_there_is_told(tmp_path):
    with pytest.raises(BadConfig, match="No such file"):
        read_config(tmp_path / "run.toml")


def test_every_key_is_documented():
    page = (CONFIGS.parent.parent.parent / "docs/pretraining.md").read_text()

    documented = set(re.findall(r"`((?:data|encoder|views|objectives|run)\.\w+)`", page))

    assert documented == {
        f"{name}.{key}" for name, section in Config.model_fields.items() for key in section.annotation.model_fields
    }


def test_patients_left_out_are_counted_in_what_is_kept_and_never_listed(tmp_path):
    (tmp_path / "run.toml").write_text("[data]\nleave_out_patients = ['abc']\n" + MINIMAL)

    assert "abc" not in str(read_config(tmp_path / "run.toml").facts())


def test_a_patient_is_not_quoted_where_the_key_is_wrong(tmp_path):
    (tmp_path / "run.toml").write_text("[data]\nleave_out_patients = [4711]\n" + MINIMAL)

    with pytest.raises(BadConfig) as error:
        read_config(tmp_path / "run.toml")

    assert str(error.value) == "run.toml: data.leave_out_patients.0: input should be a valid string"


def test_lengths_in_epochs_become_steps():
    run = RunConfig(output="out", epochs=100, batch=2048, warmup_epochs=10)

    assert run.lengths(22_496) == (1098, 110)  # 100 and 10 times 22,496 / 2,048
    assert RunConfig(output="out", steps=5, warmup_steps=9).lengths(3) == (5, 5)


def test_every_slice_comes_once_an_epoch_and_draws_are_counted():
    order = Order(slices=7, batch=3, seed=1)

    keys = [key for step in range(14) for key in order.keys(step)]

    assert sorted(keys) == [(index, epoch) for index in range(7) for epoch in range(6)]
    epochs = [[index for index, epoch in keys if epoch == each] for each in range(6)]
    assert len({tuple(each) for each in epochs}) == 6  # shuffled anew
    assert keys != [key for step in range(14) for key in Order(7, 3, seed=2).keys(step)]


def test_a_batch_larger_than_the_epoch_takes_slices_again():
    keys = Order(slices=2, batch=5, seed=0).keys(0)

    assert [draw for _, draw in keys] == [0, 0, 1, 1, 2]
    assert {index for index, _ in keys[:2]} == {index for index, _ in keys[2:4]} == {0, 1}


@pytest.mark.parametrize(("accumulate", "processes"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_a_steps_slices_are_the_same_however_they_are_dealt(accumulate, processes):
    order = Order(slices=10, batch=12, seed=0)

    dealt = [list(Parts(order, 2, 4, accumulate, rank, processes)) for rank in range(processes)]

    for step in range(2):
        parts = [part for each in dealt for part in each[step * accumulate : (step + 1) * accumulate]]
        assert {len(part) for part in parts} == {12 // accumulate // processes}
        assert sorted(key for part in parts for key in part) == sorted(order.keys(2 + step))


def test_a_batch_that_cannot_be_dealt_evenly_is_refused():
    with pytest.raises(BadConfig, match="batch 12, expected a multiple of accumulate times processes, 4 x 2"):
        Parts(Order(10, 12, 0), 0, 1, accumulate=4, processes=2)


def test_the_learning_rate_rises_on_a_line_and_falls_on_a_cosine(tmp_path):
    rates = [learning_rate(step, 12, 4, 0.8) for step in range(12)]

    expected = [0.2, 0.4, 0.6, 0.8] + [0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates == pytest.approx(expected)
    toy_run(toy_config(tmp_path, steps=4, warmup_steps=2, log_every=1))
    assert [float(row["learning_rate"]) for row in rows(tmp_path)] == [learning_rate(k, 4, 2, 0.01) for k in range(4)]


def test_a_run_learns_and_says_how(tmp_path):
    module = ToyPretraining()

    result = toy_run(toy_config(tmp_path, steps=60), module)

    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == list(range(2, 61, 2))
    assert float(table[-1]["planting"]) < 0.7 * float(table[0]["planting"])
    assert float(table[-1]["loss"]) == pytest.approx(0.5 * float(table[-1]["moco"]) + 2 * float(table[-1]["planting"]))
    assert result.losses == {name: float(table[-1][name]) for name in ("loss", "moco", "planting")}
    assert (result.steps, result.finished) == (60, True)
    assert result.images_per_s > 0 and 0 <= result.data_wait_share < 1
    assert module.progress == pytest.approx([step / 60 for step in range(1, 61)])
    assert not module.backbone._forward_hooks  # nobody watches any more


def test_a_step_in_parts_is_the_step_in_one(tmp_path):
    """Where a loss is a mean over slices; a contrastive one compares those of a part (docs/pretraining.md)."""
    modules = [ToyPretraining(plain=True) for _ in range(2)]

    results = [
        toy_run(toy_config(tmp_path / str(accumulate), batch=8, accumulate=accumulate), module)
        for accumulate, module in zip((1, 4), modules, strict=True)
    ]

    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-4)
    for left, right in zip(*(module.parameters() for module in modules), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_bf16_trains_and_keeps_its_weights_in_fp32(tmp_path):
    module = ToyPretraining()

    result = toy_run(toy_config(tmp_path, precision="bf16"), module)

    assert math.isfinite(result.losses["loss"])
    assert {each.dtype for each in module.parameters()} == {torch.float32}


def test_a_run_whose_time_is_up_leaves_a_checkpoint_and_says_how_to_go_on(tmp_path, caplog):
    with caplog.at_level("INFO"):
        result = toy_run(toy_config(tmp_path), stop=Stop(max_seconds=0))

    assert (result.steps, result.finished) == (1, False)
    assert load(result.checkpoint)["step"] == 1
    assert "step 1 of 6, checkpoint-000000001.pt" in caplog.text
    assert "stopped (its time is up); start it again to go on" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path, number, workers):
    class Interrupted(ToyPretraining):
        def after_step(self, progress):
            super().after_step(progress)
            if len(self.progress) == 3:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = toy_run(toy_config(tmp_path, workers=workers), Interrupted())

    assert (result.steps, result.finished) == (3, False)
    assert load(result.checkpoint)["step"] == 3
    assert signal.getsignal(number) is before


def test_workers_start_in_a_process_whose_opencv_has_threads(tmp_path):
    cv2.setNumThreads(2)
    cv2.GaussianBlur(np.zeros((2048, 2048), np.float32), (0, 0), 5)

    assert toy_run(toy_config(tmp_path, workers=1)).finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_group_reaches_the_workers_too_and_they_go_on(tmp_path, number):
    class Hit(ToyViews):
        def __getitem__(self, key):
            os.kill(os.getpid(), number)
            return super().__getitem__(key)

    assert toy_run(toy_config(tmp_path, workers=1), views=Hit()).finished


def test_a_loss_that_is_no_number_ends_the_run_and_is_never_saved(tmp_path):
    class Diverging(ToyPretraining):
        def forward(self, batch):
            losses = super().forward(batch)
            return losses | {"moco": losses["moco"] * (math.nan if len(self.progress) == 2 else 1)}

    with pytest.raises(Diverged, match="the loss moco is nan by step 3"):
        toy_run(toy_config(tmp_path, checkpoint_every=1), Diverging())

    assert latest(tmp_path).name == "checkpoint-000000002.pt"


def test_collapsed_embeddings_raise_an_alarm_and_gaussian_ones_do_not():
    random = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 32, generator=random)
    common = torch.randn(32, generator=random)
    line = torch.randn(200, 1, generator=random) * torch.randn(32, generator=random)

    alarms = {}
    for name, embeddings in {"noise": noise, "point": common + 0.01 * noise, "line": line + 1e-3 * noise}.items():
        watch = Watch()
        watch.add(embeddings)
        alarms[name] = watch.spread().alarm()

    assert alarms["noise"] is None
    assert "standard deviation" in alarms["point"]
    assert "effective rank is 1" in alarms["line"]


def test_spread_against_a_slow_loop():
    embeddings = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + 1
    watch = Watch()
    watch.add(embeddings[:12])
    watch.add(embeddings[12:])

    unit = [[float(x) / math.sqrt(sum(float(y) ** 2 for y in row)) for x in row] for row in embeddings]
    deviations = []
    for column in zip(*unit, strict=True):
        mean = sum(column) / 20
        deviations.append(math.sqrt(sum((x - mean) ** 2 for x in column) / 20))
    assert watch.spread().feature_std == pytest.approx(sum(deviations) / 6 * math.sqrt(6), rel=1e-5)


def test_only_the_last_embeddings_are_watched():
    watch = Watch()
    watch.add(torch.zeros(WINDOW, 2))
    watch.add(torch.ones(3, 2))

    assert watch.window.shape == (WINDOW, 2)
    assert watch.window.sum() == 6
    assert Watch().spread() is None


def test_a_run_that_collapses_says_so_once_and_in_its_rows(tmp_path, caplog):
    class Collapsed(ToyPretraining):
        def __init__(self):
            super().__init__()
            self.backbone.register_forward_hook(lambda _module, _images, answer: (answer[0], 0 * answer[1] + 1))

    toy_run(toy_config(tmp_path, batch=32, steps=8), Collapsed())

    assert caplog.text.count("embeddings collapse") == 1
    assert {row["effective_rank"] for row in rows(tmp_path)} == {"1.0"}


def test_the_clock_counts_waiting_from_the_first_batch_on():
    ticks = iter([0, 9, 9, 20, 21, 30, 33, 40])  # before, after, started; before, after; before, after; read
    clock = Clock(torch.device("cpu"), lambda: next(ticks))
    assert clock.read() == Reading()

    for _ in range(3):
        with clock.waiting(images=8):
            pass

    assert (reading := clock.read()) == Reading(seconds=31, waited=4, images=24)
    assert (reading.wait_share, reading.images_per_s) == (4 / 31, 24 / 31)


def test_figures_go_to_tensorboard_too(tmp_path):
    toy_run(toy_config(tmp_path))

    assert b"feature_std" in b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())


def in_process(number, port, folder):
    """What torchrun would start as one of two."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": "2"}
    with joined() as rank:
        for name, plain in (("straight", False), ("plain", True)):
            module = ToyPretraining(plain=plain)
            toy_run(toy_config(folder / name, batch=8, accumulate=2), module, rank=rank)
            torch.save(module.state_dict(), folder / name / f"rank-{number}.pt")
        # One of them is asked to stop, and both do.
        toy_run(toy_config(folder / "cut", batch=8, accumulate=2), rank=rank, stop=StopAfter(3) if number else Stop())
        toy_run(toy_config(folder / "cut", batch=8, accumulate=2), rank=rank)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(in_process, (port, folder), nprocs=2)
    return folder


def test_two_processes_end_with_the_same_weights(two_processes):
    first, second = (torch.load(two_processes / f"straight/rank-{number}.pt") for number in range(2))

    # Each process has the running statistics of its last part; those of the first are saved.
    learned = [name for name in first if "running" not in name]
    assert learned
    assert all(torch.equal(first[name], second[name]) for name in learned)


def test_two_processes_learn_what_one_learns(two_processes, tmp_path):
    module = ToyPretraining(plain=True)
    toy_run(toy_config(tmp_path, batch=8), module)

    shared = torch.load(two_processes / "plain/rank-0.pt")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(shared[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_cut_and_resumed_are_the_same_to_the_last_bit(two_processes):
    straight, cut = (load(latest(two_processes / name)) for name in ("straight", "cut"))

    assert [row["step"] for row in rows(two_processes / "cut")] == ["2", "4", "6"]
    assert all(torch.equal(value, cut["module"][name]) for name, value in straight["module"].items())
    assert [each["cpu"].tolist() for each in straight["random"]] == [each["cpu"].tolist() for each in cut["random"]]


def test_a_checkpoint_of_two_processes_is_refused_by_one(two_processes):
    with pytest.raises(WrongCheckpoint, match="processes: found 2, expected 1"):
        toy_run(toy_config(two_processes / "cut", batch=8, accumulate=2))
