"""The assembly line with a small network of known arithmetic and real processes."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn

from models.ct.reasons import Reason
from models.ct.screening import SetAside
from models.line import Line
from models.load import Encoder
from models.zoo import TEST

SPEC = dataclasses.replace(TEST, dim=2, input_size=4, mean=(0.0,), std=(1.0,))


class MeanAndMaximum(nn.Module):
    """An embedding that can be worked out by hand; remembers the shapes it saw."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def forward(self, images):
        self.shapes.append(tuple(images.shape))
        return torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)


def prepare(item, out):
    """A number is a slice of it at one window and of twice it at the other; the others tell what to do."""
    if item == "bad":
        return SetAside(Reason.UNDECODABLE, "bad")
    if item == "lost":
        raise FileNotFoundError(2, "lost")
    if item == "slow":
        time.sleep(1.5)
        item = 0
    out[0], out[1] = item / 1000, item / 500
    out[:, 0, 0] += 1
    return f"said {item}"


def expected(item):
    return np.array([[(item / 1000 * 16 + 1) / 16, item / 1000 + 1], [(item / 500 * 16 + 1) / 16, item / 500 + 1]])


def opened(network, folder):
    return Line(Encoder(SPEC, network, "0" * 64, folder), prepare, processes=2, silent_seconds=20.0)


@pytest.fixture(scope="module")
def the_network():
    return MeanAndMaximum()


@pytest.fixture(scope="module")
def line(the_network, tmp_path_factory):
    line = opened(the_network, tmp_path_factory.mktemp("compiled"))
    line.embed([1] * 8, lambda done: None)  # its processes are awake
    yield line
    line.close()


@pytest.fixture
def network(the_network):
    the_network.shapes.clear()
    yield the_network
    vars(the_network).pop("forward", None)


def test_items_come_back_in_order_with_what_was_said_of_them(line):
    items = list(range(100))

    answers = line.embed(items, lambda done: None)

    assert [said for said, _ in answers] == [f"said {item}" for item in items]
    np.testing.assert_allclose([row for _, row in answers], [expected(item) for item in items], rtol=1e-5)


def test_what_is_set_aside_has_no_embedding_and_spoils_none(line):
    answers = line.embed([1, "bad", 2, "bad", "bad"], lambda done: None)

    assert [said if isinstance(said, str) else said.detail for said, _ in answers] == [
        "said 1",
        "bad",
        "said 2",
        "bad",
        "bad",
    ]
    assert [row is None for _, row in answers] == [False, True, False, True, True]
    np.testing.assert_allclose([answers[0][1], answers[2][1]], [expected(1), expected(2)], rtol=1e-5)


def test_a_batch_of_nothing_never_reaches_the_network(line, network):
    assert line.embed([], lambda done: None) == []
    line.embed(["bad"] * 9, lambda done: None)

    assert network.shapes == []


def test_series_share_batches_of_one_shape(line, network):
    """Two threads with 20 slices each: 5 batches of 8, where each alone would fill 3."""
    results, begin = {}, threading.Barrier(2)

    def embed(name, items):
        begin.wait()
        results[name] = line.embed(items, lambda done: None)

    sets = {"a": list(range(20)), "b": list(range(100, 120))}
    threads = [threading.Thread(target=embed, args=each) for each in sets.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for name, items in sets.items():
        np.testing.assert_allclose([row for _, row in results[name]], [expected(item) for item in items], rtol=1e-5)
    assert set(network.shapes) == {(16, 1, 4, 4)}
    assert len(network.shapes) in (5, 6)  # 6 where one was done before the other began


def test_a_slow_item_is_waited_for_and_progress_is_noted_meanwhile(line):
    noted = []

    line.embed([*range(16), "slow"], noted.append)

    assert noted == sorted(noted)
    assert noted[-1] == 17
    assert len(noted) >= 17 + 1 + 1  # as each was put in, while the last was waited for, at the end


def test_an_error_reaches_the_series_it_belongs_to_and_the_line_goes_on(line):
    with pytest.raises(OSError, match="No such file"):
        line.embed([1, "lost", 2], lambda done: None)

    assert line.embed([3], lambda done: None)[0][0] == "said 3"


def test_a_network_that_fails_fails_its_batch_and_the_line_goes_on(line, network):
    def fail(images):
        raise RuntimeError("no")

    network.forward = fail
    with pytest.raises(RuntimeError, match="no"):
        line.embed([1], lambda done: None)

    del network.forward
    np.testing.assert_allclose(line.embed([3], lambda done: None)[0][1], expected(3), rtol=1e-5)


def test_a_device_without_memory_for_the_batch_is_given_halves_of_it(network, tmp_path):
    forward = network.forward
    line = opened(network, tmp_path)

    def small_device(images):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    network.forward = small_device

    answers = line.embed(list(range(12)), lambda done: None)

    np.testing.assert_allclose([row for _, row in answers], [expected(item) for item in range(12)], rtol=1e-5)
    assert set(network.shapes) == {(4, 1, 4, 4)}
    line.embed([1] * 8, lambda done: None)
    assert len(network.shapes) == 4 * 3  # and it stays with what fits: no second attempt at the whole
    line.close()


def test_a_device_without_memory_for_one_slice_says_so(network, tmp_path):
    line = opened(network, tmp_path)

    def no_device(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    network.forward = no_device

    with pytest.raises(torch.OutOfMemoryError):
        line.embed([1], lambda done: None)
    line.close()
