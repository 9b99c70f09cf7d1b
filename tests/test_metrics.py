import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from models.heads.metrics import BOOTSTRAP_DRAWS, METRICS, _patient_draws, evaluate


def slow_auroc(truth, probability):
    """The share of pairs of a positive and a negative that are ordered right; a tie is half right."""
    positives = [p for t, p in zip(truth, probability, strict=True) if t == 1]
    negatives = [p for t, p in zip(truth, probability, strict=True) if t == 0]
    right = sum((p > n) + (p == n) / 2 for p, n in itertools.product(positives, negatives))
    return right / (len(positives) * len(negatives))


def slow_auprc(truth, probability):
    """Precision at every threshold, weighted by the recall it adds."""
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(probability), reverse=True):
        called = [t for t, p in zip(truth, probability, strict=True) if p >= threshold]
        recall = sum(called) / sum(truth)
        area += (recall - recall_before) * sum(called) / len(called)
        recall_before = recall
    return area


def slow_f1(truth, probability):
    called = [p >= 0.5 for p in probability]
    right = sum(c and t == 1 for c, t in zip(called, truth, strict=True))
    return 2 * right / (sum(called) + sum(truth)) if right else 0.0


SLOW = {"auroc": slow_auroc, "auprc": slow_auprc, "f1": slow_f1}
FEW = st.integers(0, 8).map(lambda k: k / 8)  # few values, so many ties


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), FEW), min_size=2, max_size=20))
def test_every_metric_is_its_definition(rows):
    truth, probability = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    assume(0 < truth.sum() < len(truth))

    assert {name: metric(truth, probability) for name, metric in METRICS.items()} == pytest.approx(
        {name: metric(truth.tolist(), probability.tolist()) for name, metric in SLOW.items()}
    )


TRUTH = np.array([0.0, 0, 0, 1, 1, 0, 1, 1, 0, 1])
PROBABILITY = np.array([0.1, 0.4, 0.6, 0.35, 0.8, 0.2, 0.9, 0.55, 0.7, 0.45])


@pytest.fixture(scope="module")
def report():
    """Ten patients of one bag each."""
    return evaluate(TRUTH, PROBABILITY, np.arange(10), seed=0)


def test_an_evaluation_holds_counts_and_every_metric_with_its_interval(report):
    assert list(report) == ["bags", "positives", "auroc", "auprc", "f1"]
    assert (report["bags"], report["positives"]) == (10, 5)
    for name, slow in SLOW.items():
        low, high = report[name]["interval_95"]
        assert report[name]["value"] == pytest.approx(slow(TRUTH, PROBABILITY), abs=5e-5)
        assert low < report[name]["value"] < high


def test_the_interval_is_the_middle_95_percent_of_resampled_metrics(report):
    random, values = np.random.default_rng(8), []
    while len(values) < 4000:
        rows = random.integers(10, size=10)
        if 0 < TRUTH[rows].sum() < 10:
            values.append(slow_auroc(TRUTH[rows], PROBABILITY[rows]))

    np.testing.assert_allclose(report["auroc"]["interval_95"], np.percentile(values, [2.5, 97.5]), atol=0.06)


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_with_a_single_class_there_is_no_metric(only):
    truth = np.full(4, only)

    assert evaluate(truth, np.linspace(0, 1, 4), np.arange(4), seed=0) == {
        "bags": 4,
        "positives": int(4 * only),
        "auroc": None,
        "auprc": None,
        "f1": None,
    }


def test_the_bootstrap_draws_whole_patients():
    patients = np.array([0, 0, 0, 1, 1, 2, 3, 4, 4, 5])

    draws = _patient_draws(TRUTH, patients, seed=0)

    assert 0 < len(draws) <= BOOTSTRAP_DRAWS
    for rows in draws:
        drawn = Counter(rows.tolist())
        times = [{drawn[row] for row in np.flatnonzero(patients == patient)} for patient in range(6)]
        assert all(len(each) == 1 for each in times)  # all bags of a patient, equally often
        assert sum(each.pop() for each in times) == 6
        assert set(TRUTH[rows]) == {0, 1}


def test_many_bags_of_the_same_patients_do_not_narrow_the_interval(report):
    tenfold = evaluate(*(np.repeat(each, 10) for each in (TRUTH, PROBABILITY, np.arange(10))), seed=0)

    assert {name: tenfold[name] for name in METRICS} == {name: report[name] for name in METRICS}


def test_the_same_seed_draws_the_same_patients_and_another_seed_others():
    draws = [[rows.tolist() for rows in _patient_draws(TRUTH, np.arange(10), seed)] for seed in (1, 1, 2)]

    assert draws[0] == draws[1] != draws[2]
