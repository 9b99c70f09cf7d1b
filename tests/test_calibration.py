import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.heads.calibration import best_threshold, fit_temperatures, probabilities


def slow_loss(logits, truth, temperature):
    """Negative log-likelihood of Platt's targets, case by case."""
    n, p = sum(t == 0 for t in truth), sum(t == 1 for t in truth)
    total = 0.0
    for logit, t in zip(logits, truth, strict=True):
        target = (p + 1) / (p + 2) if t == 1 else 1 / (n + 2)
        positive = 1 / (1 + math.exp(-logit / temperature))
        total -= target * math.log(positive) + (1 - target) * math.log(1 - positive)
    return total


def test_no_temperature_is_better_than_the_one_chosen():
    random = np.random.default_rng(0)
    truth = (random.random(80) < 0.4).astype(float)
    logits = (truth - 0.5) * 3 + random.normal(0, 3, 80)

    (chosen,) = fit_temperatures(logits[:, None], truth[:, None], one_of_n=False)

    best = slow_loss(logits, truth, chosen)
    assert all(best <= slow_loss(logits, truth, each) + 1e-6 for each in np.geomspace(0.5, 20, 100))


def test_logits_that_are_three_times_too_sure_are_divided_by_three():
    random = np.random.default_rng(1)
    logits = random.normal(0, 1.5, 4000)
    truth = (random.random(4000) < 1 / (1 + np.exp(-logits))).astype(float)

    (chosen,) = fit_temperatures(3 * logits[:, None], truth[:, None], one_of_n=False)

    assert chosen == pytest.approx(3, rel=0.1)


def test_the_same_for_one_of_several_classes():
    random = np.random.default_rng(2)
    logits = random.normal(0, 1.5, (4000, 3))
    chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    truth = np.eye(3)[[random.choice(3, p=each) for each in chance]]

    chosen = fit_temperatures(3 * logits, truth, one_of_n=True)

    assert chosen == pytest.approx([chosen[0]] * 3)
    assert chosen[0] == pytest.approx(3, rel=0.1)


def test_two_classes_are_calibrated_like_one_label_of_their_difference():
    random = np.random.default_rng(3)
    logits, truth = random.normal(size=(60, 2)), np.eye(2)[random.integers(2, size=60)]

    (of_label,) = fit_temperatures(logits[:, 1:] - logits[:, :1], truth[:, 1:], one_of_n=False)

    assert fit_temperatures(logits, truth, one_of_n=True)[0] == pytest.approx(of_label, rel=1e-3)


def test_cases_told_apart_without_an_error_do_not_become_certain():
    logits, truth = np.array([-2.0, -1, -3, 1, 2, 3]), np.array([0.0, 0, 0, 1, 1, 1])

    temperature = fit_temperatures(logits[:, None], truth[:, None], one_of_n=False)

    found = probabilities(logits[:, None], temperature, one_of_n=False)
    assert found.max() < 0.95


def test_unknown_cells_and_single_classes_choose_nothing():
    nan = float("nan")
    logits = np.array([[1.0, 5.0, 1.0], [-2.0, 9.0, 1.0], [0.5, -9.0, 2.0], [9.0, 0.0, 3.0]])
    truth = np.array([[1.0, nan, 1.0], [0.0, nan, 1.0], [0.0, nan, nan], [nan, nan, 1.0]])

    found = fit_temperatures(logits, truth, one_of_n=False)

    assert found[0] == fit_temperatures(logits[:3, :1], truth[:3, :1], one_of_n=False)[0]
    assert found[1:].tolist() == [1.0, 1.0]
    assert best_threshold(np.array([0.2, 0.9]), np.array([nan, 1.0])) == 0.5


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=2, max_size=15))
def test_no_threshold_has_a_higher_f1(rows):
    truth, probability = np.array([float(t) for t, _ in rows]), np.array([p / 10 for _, p in rows])

    def f1(threshold):
        called = probability >= threshold
        right = (called & (truth == 1)).sum()
        return 2 * right / (called.sum() + truth.sum()) if right else 0.0

    if 0 < truth.sum() < len(truth):
        best = f1(best_threshold(probability, truth))
        assert all(best >= f1(threshold) for threshold in np.linspace(-0.01, 1.01, 103))


def test_the_threshold_lies_between_the_classes():
    assert best_threshold(np.array([0.1, 0.2, 0.6, 0.9]), np.array([0.0, 0, 1, 1])) == pytest.approx(0.4)
