import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import heads
from bench.heads import Trained, in_fresh_process, padded, plain, positive, streamed, write_bags
from bench.memory import MB, peak_mb
from models.heads import evaluation, loader
from models.heads.options import HeadOptions
from service.storage.bags import Bags
from service.storage.folder import Folder

ROOT = Path(__file__).resolve().parent.parent
BAGS, SLICES, LARGE_SLICES = 40, 12, 200
# Without dropout, whose masks would be drawn in another order, both loops do the same sums.
SAME_SUMS = HeadOptions(epochs=6, patience=6, batch_size=16, learning_rate=1e-3, dropout=0.0)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The two trainings on the same few bags."""
    root = tmp_path_factory.mktemp("bags")
    write_bags(root, BAGS, SLICES)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(loader, "KEEP_BYTES", loader.KEEP_BYTES)
        return streamed(root, BAGS, SAME_SUMS), plain(root, BAGS, SAME_SUMS)


@pytest.fixture(scope="module")
def large_bags(tmp_path_factory):
    root = tmp_path_factory.mktemp("large")
    write_bags(root, 120, LARGE_SLICES)
    return root


def in_small_chunks(root, bags, keep_bytes):
    """Trained where neither the bags of a chunk nor the bootstrap need much memory, so that only what is kept can."""
    loader.CHUNK_INSTANCES, evaluation.BOOTSTRAP_DRAWS = 2 * LARGE_SLICES, 20
    return streamed(root, bags, HeadOptions(folds=2, epochs=1, batch_size=8), keep_bytes)


def test_both_loops_update_their_weights_as_often(both):
    batches = math.ceil(BAGS * 4 / 5 / SAME_SUMS.batch_size)

    assert [each.updates for each in both] == [5 * SAME_SUMS.epochs * batches] * 2


def test_both_loops_reach_the_same_losses_on_the_same_folds(both):
    ours, theirs = both

    assert len(ours.losses) == 5
    np.testing.assert_allclose(ours.losses, theirs.losses, atol=1e-4)
    assert max(ours.losses) < math.log(2)  # that of knowing nothing


def test_both_loops_tell_held_out_lesions_from_none_as_well(both):
    ours, theirs = both

    assert ours.auroc == pytest.approx(theirs.auroc, abs=1e-4)
    assert ours.auroc > 0.7


def test_every_second_bag_of_noise_has_a_lesion_on_few_slices(tmp_path):
    write_bags(tmp_path, 4, 100)
    bags = [Bags(Folder(tmp_path)).get(*heads.name_of(number)) for number in range(4)]

    assert {(bag.shape, bag.dtype) for bag in bags} == {((100, 2, 576), np.dtype(np.float16))}
    moved = [np.flatnonzero(bag.mean(axis=(1, 2), dtype=np.float64) > heads.LESION / 2) for bag in bags]
    assert [len(slices) for slices in moved] == [0, 2, 0, 2]
    assert [bool(len(slices)) for slices in moved] == [positive(number) for number in range(4)]


def test_a_process_has_a_peak_of_its_own_whatever_that_of_its_parent():
    ballast = np.ones(600 * MB, np.uint8)

    assert peak_mb() > ballast.nbytes / MB
    assert in_fresh_process(peak_mb) < ballast.nbytes / MB


def test_bags_of_unlike_length_are_padded_as_the_product_pads_them():
    bags = [torch.full((length, 3), float(length)) for length in (2, 5, 1)]

    for found, expected in zip(padded(bags), loader.pad(bags), strict=True):
        assert torch.equal(found, expected)


def test_the_last_line_has_the_medians_and_the_largest_peaks(capsys):
    run = Trained(seconds=2.0, peak_mb=900.0, updates=1, losses=[0.5], auroc=0.8)
    found = {
        "streamed": [run, replace(run, seconds=9.0), replace(run, seconds=1.0, peak_mb=950.4)],
        "plain": [replace(run, seconds=seconds, peak_mb=2000.0) for seconds in (1.6, 0.1, 4.0)],
    }

    heads.report(found, "bags")

    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "over_plain_loop": 1.25,
        "seconds": 2.0,
        "peak_mb": 950,
        "plain_seconds": 1.6,
        "plain_peak_mb": 2000,
    }


def test_the_bench_runs_and_ends_with_its_figures():
    small = ["--bags", "20", "--slices", "4", "--epochs", "1", "--rounds", "1"]

    answer = subprocess.run(
        [sys.executable, "bench/heads.py", *small], cwd=ROOT, check=True, capture_output=True, text=True
    )

    figures = json.loads(answer.stdout.splitlines()[-1])
    assert [*figures] == ["over_plain_loop", "seconds", "peak_mb", "plain_seconds", "plain_peak_mb"]
    assert all(figure > 0 for figure in figures.values())
