"""Why a head said what it said: folds and their spread, deletion, key slices."""

import itertools

import numpy as np
import pytest
import torch

from models.abmil import ABMIL, Ensemble, GatedABMIL, MaxPooling, MeanPooling
from models.heads.explain import faithfulness, key_slices, spread
from models.heads.export import to_onnx
from models.heads.run import HeadRunner

DIM, LABELS, FOLDS = 12, 2, 3


def random_ensemble(kind, one_of_n=False):
    """Weights large enough that instances, folds and labels differ; and not one temperature for all."""
    torch.manual_seed(7)
    heads = [kind(DIM, LABELS, hidden=8) for _ in range(FOLDS)]
    with torch.no_grad():
        for each in itertools.chain.from_iterable(head.parameters() for head in heads):
            each.mul_(3)
    return Ensemble(heads, one_of_n, [0.5, 2.0]).eval()


@pytest.fixture(scope="module", params=[(ABMIL, False), (ABMIL, True), (GatedABMIL, False), (MaxPooling, False)])
def head(request):
    ensemble = random_ensemble(*request.param)
    return ensemble, HeadRunner(to_onnx(ensemble, DIM))


def random_bag(slices=9, windows=2):
    return np.random.default_rng(3).normal(size=(slices, windows, DIM)).astype(np.float16)


@torch.inference_mode()
def alone(ensemble, bag, kept=None):
    """Each fold on its own, on a bag that has no more than the kept instances: [(probabilities, attention)]."""
    instances = torch.from_numpy(bag.reshape(-1, DIM).astype(np.float32))
    instances = instances if kept is None else instances[kept]
    temperature = ensemble.temperature.tolist()
    return [
        tuple(each.numpy() for each in Ensemble([fold], ensemble.one_of_n, temperature).eval()(instances))
        for fold in ensemble.heads
    ]


def test_a_reading_has_every_folds_own_answer(head):
    ensemble, runner = head
    bag = random_bag()

    reading = runner.read(bag)

    for fold, (probabilities, attention) in enumerate(alone(ensemble, bag)):
        np.testing.assert_allclose(reading.fold_probabilities[fold], probabilities, atol=1e-6)
        np.testing.assert_allclose(reading.fold_attention[fold].reshape(-1), attention, atol=1e-6)
    np.testing.assert_allclose(reading.fold_attention.sum(axis=(1, 2)), 1, atol=1e-5)
    assert reading.fold_attention.std(axis=0).max() > 0.01  # folds that agree would prove nothing


def test_a_removed_instance_is_as_if_it_had_never_been_there(head):
    ensemble, runner = head
    bag, random = random_bag(), np.random.default_rng(0)
    removed = np.array([random.permutation(18) < count for count in (0, 1, 9, 17)])

    without = runner.without(bag, removed)

    for run, answer in zip(removed, without, strict=True):
        expected = np.mean([probabilities for probabilities, _ in alone(ensemble, bag, ~run)], axis=0)
        np.testing.assert_allclose(answer, expected, atol=1e-6)


@pytest.mark.parametrize(("share", "removed"), [(0.1, 2), (0.001, 1), (0.5, 9), (0.999, 17)])
def test_faithfulness_removes_the_top_instances_against_the_mean_of_random_draws(head, share, removed):
    ensemble, runner = head
    bag = random_bag()
    folds = alone(ensemble, bag)
    attention = np.mean([weights for _, weights in folds], axis=0)
    order = sorted(range(18), key=lambda k: -attention[k])

    found = faithfulness(runner, bag, runner.read(bag), share=share, draws=400, seed=1)

    assert (found.removed, found.instances, found.draws, found.seed) == (removed, 18, 400, 1)
    np.testing.assert_allclose(found.whole, np.mean([each for each, _ in folds], axis=0), atol=1e-6)
    top = [k not in order[:removed] for k in range(18)]
    expected = np.mean([each for each, _ in alone(ensemble, bag, np.array(top))], axis=0)
    np.testing.assert_allclose(found.without_top, expected, atol=1e-6)
    if removed in (1, 17):  # few enough ways that all of them make the exact mean
        ways = [np.arange(18) != k if removed == 1 else np.arange(18) == k for k in range(18)]
        exact = np.array([np.mean([each for each, _ in alone(ensemble, bag, way)], axis=0) for way in ways])
        error = 4 * exact.std(axis=0) / np.sqrt(400) + 1e-6
        assert (np.abs(found.without_random - exact.mean(axis=0)) < error).all()
        np.testing.assert_allclose(found.without_random_std, exact.std(axis=0), rtol=0.25, atol=1e-6)


def test_the_same_seed_draws_the_same(head):
    _, runner = head
    bag = random_bag()
    reading = runner.read(bag)

    first, again, other = (faithfulness(runner, bag, reading, share=0.3, seed=seed) for seed in (5, 5, 6))

    assert np.array_equal(first.without_random, again.without_random)
    assert not np.array_equal(first.without_random, other.without_random)


def test_a_head_that_looks_where_it_should_loses_more_without_what_it_looks_at():
    """One instance of forty makes the bag positive, and the attention is on it."""
    torch.manual_seed(0)
    fold = ABMIL(DIM, 1, hidden=8).eval()
    with torch.no_grad():
        for each in fold.parameters():
            each.zero_()
        fold.encoder[0].weight[0, 0] = 1.0  # the first hidden unit is the sign
        fold.V.weight[0, 0] = 1.0
        fold.w.weight[0, 0] = 20.0
        fold.head[0].weight.fill_(1.0)
        fold.head[1].weight[0, 0], fold.head[4].weight[0, 0], fold.head[4].bias[0] = 1.0, 5.0, -3.0
    bag = np.zeros((20, 2, DIM), np.float16)
    bag[7, 1, 0] = 4.0
    runner = HeadRunner(to_onnx(Ensemble([fold], one_of_n=False), DIM))

    found = faithfulness(runner, bag, runner.read(bag), share=0.05)

    assert found.whole[0] > 0.9
    assert found.without_top[0] < 0.1
    assert found.without_random[0] > 0.8


def test_nothing_is_removed_from_a_bag_of_one_instance(head):
    _, runner = head
    bag = random_bag(1, 1)
    assert faithfulness(runner, bag, runner.read(bag)) is None


def test_mean_pooling_looks_everywhere_alike_with_instances_left_out_too():
    ensemble = random_ensemble(MeanPooling)
    runner, bag = HeadRunner(to_onnx(ensemble, DIM)), random_bag()
    removed = np.arange(18)[None] < 5

    np.testing.assert_allclose(runner.read(bag).attention, 1 / 18, atol=1e-7)
    expected = np.mean([each for each, _ in alone(ensemble, bag, ~removed[0])], axis=0)
    np.testing.assert_allclose(runner.without(bag, removed)[0], expected, atol=1e-6)


def test_the_spread_is_the_standard_deviation_of_a_sample_of_folds():
    by_fold = np.array([[0.1, 0.5], [0.3, 0.5], [0.5, 0.5]], np.float32)

    np.testing.assert_allclose(spread(by_fold), [0.2, 0.0], atol=1e-7)
    assert spread(by_fold[:1]).tolist() == [0.0, 0.0]


def slow_key_slices(weights, series, z_mm, most, apart_mm):
    """Take the heaviest, strike out its neighbours, and again."""
    left, chosen = set(range(len(weights))), []
    while left and len(chosen) < most:
        best = max(left, key=lambda k: (weights[k], -k))
        chosen.append(best)
        left = {k for k in left if series[k] != series[best] or abs(z_mm[k] - z_mm[best]) >= apart_mm} - {best}
    return chosen


@pytest.mark.parametrize("seed", range(20))
def test_key_slices_are_the_heaviest_that_lie_apart(seed):
    random = np.random.default_rng(seed)
    series = [*["a"] * 30, *["b"] * 20]
    z_mm = [*(2.5 * np.arange(30)), *(3.0 * np.arange(20))]
    weights = random.choice(np.float32([0.1, 0.2, 0.3, 0.4]), 50) if seed % 2 else random.random(50, np.float32)

    found = key_slices(weights, series, z_mm, most=6, apart_mm=10.0)

    assert found == slow_key_slices(weights, series, z_mm, 6, 10.0)
    assert len(found) == 6


def test_slices_just_as_far_apart_as_asked_both_stay():
    assert key_slices(np.float32([3, 2, 1]), ["a"] * 3, [0.0, 10.0, 19.9], most=5, apart_mm=10.0) == [0, 1]
