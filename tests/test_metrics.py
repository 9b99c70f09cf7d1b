import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from models.heads.crossfit import Predictions
from models.heads.curves import curves
from models.heads.evaluation import BOOTSTRAP_DRAWS, evaluate, patient_draws
from models.heads.metrics import metrics


def slow_auroc(truth, probability, _):
    """The share of pairs of a positive and a negative that are ordered right; a tie is half right."""
    positives = [p for t, p in zip(truth, probability, strict=True) if t == 1]
    negatives = [p for t, p in zip(truth, probability, strict=True) if t == 0]
    right = sum((p > n) + (p == n) / 2 for p, n in itertools.product(positives, negatives))
    return right / (len(positives) * len(negatives))


def slow_auprc(truth, probability, _):
    """Precision at every threshold, weighted by the recall it adds."""
    area, recall_before = 0.0, 0.0
    for threshold in sorted(set(probability), reverse=True):
        called = [t for t, p in zip(truth, probability, strict=True) if p >= threshold]
        recall = sum(called) / sum(truth)
        area += (recall - recall_before) * sum(called) / len(called)
        recall_before = recall
    return area


def slow_f1(truth, _, called):
    right = sum(c and t == 1 for c, t in zip(called, truth, strict=True))
    return 2 * right / (sum(called) + sum(truth)) if right else 0.0


def slow_brier(truth, probability, _):
    return sum((p - t) ** 2 for t, p in zip(truth, probability, strict=True)) / len(truth)


def slow_ece(truth, probability, _):
    """Guo et al. 2017, Eq. 3, bin by bin: the bin of p is the one with low < p <= high, 0 with the first."""
    total = 0.0
    for low, high in ((k / 15, (k + 1) / 15) for k in range(15)):
        inside = [(t, p) for t, p in zip(truth, probability, strict=True) if low < p <= high or (p == low == 0)]
        if inside:
            accuracy = sum(t for t, _ in inside) / len(inside)
            confidence = sum(p for _, p in inside) / len(inside)
            total += len(inside) / len(truth) * abs(accuracy - confidence)
    return total


def slow_sensitivity(truth, probability, _):
    """Every threshold tried, one above all cases too."""
    best = 0.0
    for threshold in [*probability, 2.0]:
        alone = [p < threshold for t, p in zip(truth, probability, strict=True) if t == 0]
        found = [p >= threshold for t, p in zip(truth, probability, strict=True) if t == 1]
        if sum(alone) / len(alone) >= 0.9 - 1e-9:
            best = max(best, sum(found) / len(found))
    return best


SLOW = {
    "auroc": slow_auroc,
    "auprc": slow_auprc,
    "f1": slow_f1,
    "brier": slow_brier,
    "ece": slow_ece,
    "sensitivity": slow_sensitivity,
}
FEW = st.integers(0, 10).map(lambda k: k / 10)  # few values, so many ties
METRICS = metrics(0.9)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), FEW, st.booleans(), st.integers(0, 3)), min_size=2, max_size=20))
def test_every_metric_is_its_definition_on_the_rows_as_often_as_they_were_drawn(rows):
    truth, probability, called, weights = (np.array(column) for column in zip(*rows, strict=True))
    drawn = np.repeat(np.arange(len(rows)), weights)
    assume(0 < truth[drawn].sum() < len(drawn))
    floats = truth.astype(float)

    fast = {name: metric(floats, probability, called, weights[None].astype(float)) for name, metric in METRICS.items()}

    slow = {
        name: metric(floats[drawn].tolist(), probability[drawn].tolist(), called[drawn].tolist())
        for name, metric in SLOW.items()
    }
    assert {name: value[0] for name, value in fast.items()} == pytest.approx(slow, abs=1e-9)


def test_they_are_those_of_scikit_learn_too():
    random = np.random.default_rng(0)
    truth, probability = (random.random(300) < 0.3).astype(float), random.random(300).round(2)
    called, weights = probability > 0.4, random.integers(0, 4, (3, 300)).astype(float)

    for k, own in enumerate(weights):
        expected = [
            roc_auc_score(truth, probability, sample_weight=own),
            average_precision_score(truth, probability, sample_weight=own),
            f1_score(truth, called, sample_weight=own),
            brier_score_loss(truth, probability, sample_weight=own),
        ]
        found = [METRICS[name](truth, probability, called, weights)[k] for name in ("auroc", "auprc", "f1", "brier")]
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_a_draw_of_one_class_has_no_metric(only):
    truth, probability = np.array([only, only, 1 - only]), np.array([0.2, 0.6, 0.4])

    for metric in METRICS.values():
        values = metric(truth, probability, probability > 0.5, np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 1.0]]))
        assert np.isnan(values).tolist() == [True, False]


TRUTH = np.array([0.0, 0, 0, 1, 1, 0, 1, 1, 0, 1])
PROBABILITY = np.array([0.1, 0.4, 0.6, 0.35, 0.8, 0.2, 0.9, 0.55, 0.7, 0.45])


def said(probability, rows=None, folds=()):
    """Predictions of one label, called at 0.5."""
    column = np.array(probability, dtype=float)[:, None]
    rows = np.arange(len(column)) if rows is None else rows
    return Predictions(rows, column, column, column >= 0.5, np.ones((len(column), 1)), list(folds))


def figures(truth, probability, patients, seed=0, folds=()):
    truth = np.array(truth, dtype=float)[:, None]
    return evaluate(said(probability, folds=folds), truth, patients, ["x"], 0.9, seed).labels["x"]


@pytest.fixture(scope="module")
def report():
    """Ten patients of one bag each."""
    return figures(TRUTH, PROBABILITY, np.arange(10))


def test_an_evaluation_holds_counts_and_every_metric_with_its_interval(report):
    assert list(report) == ["bags", "positives", *METRICS, "uncalibrated"]
    assert (report["bags"], report["positives"]) == (10, 5)
    for name, slow in SLOW.items():
        low, high = report[name]["interval_95"]
        assert report[name]["value"] == pytest.approx(slow(TRUTH, PROBABILITY, PROBABILITY >= 0.5), abs=5e-5)
        assert low < high
        assert report[name]["over_folds"] is None


def test_the_interval_is_the_middle_95_percent_of_resampled_metrics(report):
    random, values = np.random.default_rng(8), []
    while len(values) < 2000:
        rows = random.integers(10, size=10)
        if 0 < TRUTH[rows].sum() < 10:
            values.append(slow_auroc(TRUTH[rows], PROBABILITY[rows], None))

    np.testing.assert_allclose(report["auroc"]["interval_95"], np.percentile(values, [2.5, 97.5]), atol=0.06)


@pytest.mark.parametrize("only", [0.0, 1.0])
def test_with_a_single_class_there_is_no_metric(only):
    found = figures(np.full(4, only), np.linspace(0, 1, 4), np.arange(4))

    assert found == {"bags": 4, "positives": int(4 * only), **dict.fromkeys(METRICS), "uncalibrated": None}


def test_an_unknown_row_counts_for_nothing(report):
    with_unknown = figures([*TRUTH, np.nan, np.nan], [*PROBABILITY, 0.99, 0.01], np.arange(12))

    assert {k: v["value"] for k, v in with_unknown.items() if k in METRICS} == {
        k: v["value"] for k, v in report.items() if k in METRICS
    }
    assert with_unknown["bags"] == 10


def test_the_bootstrap_draws_whole_patients():
    patients = np.array([7, 7, 7, 1, 1, 2, 3, 4, 4, 5])

    draws = np.concatenate(list(patient_draws(patients, seed=0)))

    assert draws.shape == (BOOTSTRAP_DRAWS, 10)
    assert (draws[:, :3] == draws[:, :1]).all() and (draws[:, 3] == draws[:, 4]).all()
    assert (draws[:, [0, 3, 5, 6, 7, 9]].sum(axis=1) == 6).all()


def test_many_bags_of_the_same_patients_do_not_narrow_the_interval(report):
    tenfold = figures(*(np.repeat(each, 10) for each in (TRUTH, PROBABILITY, np.arange(10))))

    for name in METRICS:
        assert tenfold[name]["interval_95"] == pytest.approx(report[name]["interval_95"], abs=2e-4)


def test_draws_that_do_not_fit_memory_at_once_are_the_same_kind_of_draws(monkeypatch):
    monkeypatch.setattr("models.heads.evaluation.DRAWN_AT_ONCE", 70)

    parts = list(patient_draws(np.arange(10), seed=0))

    assert max(len(part) for part in parts) == 7
    assert sum(len(part) for part in parts) == BOOTSTRAP_DRAWS


def test_over_folds_is_the_mean_and_sample_deviation_of_the_folds_own_values():
    folds = [said(PROBABILITY[rows], rows) for rows in (np.arange(5), np.arange(5, 10))]

    found = figures(TRUTH, PROBABILITY, np.arange(10), folds=folds)["auroc"]["over_folds"]

    own = [slow_auroc(TRUTH[rows], PROBABILITY[rows], None) for rows in (slice(5), slice(5, 10))]
    assert found["folds"] == pytest.approx(own, abs=5e-5)
    assert found["mean"] == pytest.approx(sum(own) / 2, abs=1e-4)
    assert found["std"] == pytest.approx(abs(own[0] - own[1]) / 2**0.5, abs=1e-4)


def test_the_average_is_over_labels_that_have_both_classes():
    truth = np.stack([TRUTH, 1 - TRUTH, np.zeros(10)], axis=1)
    one = said(PROBABILITY)
    columns = (np.repeat(each, 3, axis=1) for each in (one.probability, one.uncalibrated, one.called))
    three = Predictions(one.rows, *columns, one.window_share)

    found = evaluate(three, truth, np.arange(10), ["a", "b", "c"], 0.9, 0)

    assert found.labels["c"]["auroc"] is None
    assert found.average["auroc"]["value"] == pytest.approx(0.5)  # a, and the same the other way round


def test_curves_are_the_areas_told():
    found = curves(TRUTH, PROBABILITY)

    assert np.trapezoid(found["roc"]["tpr"], found["roc"]["fpr"]) == pytest.approx(slow_auroc(TRUTH, PROBABILITY, None))
    recall, precision = np.array(found["pr"]["recall"]), np.array(found["pr"]["precision"])
    assert np.sum(np.diff(recall) * precision[1:]) == pytest.approx(slow_auprc(TRUTH, PROBABILITY, None), abs=1e-4)
    bins = found["calibration"]
    gaps = np.abs(np.array(bins["frequency"]) - bins["probability"]) * bins["bags"]
    assert gaps.sum() / 10 == pytest.approx(slow_ece(TRUTH, PROBABILITY, None), abs=1e-4)


def test_risk_falls_to_the_errors_among_the_surest():
    found = curves(np.array([1.0, 0, 1, 0, 1]), np.array([0.95, 0.1, 0.3, 0.4, 0.45]))["risk_coverage"]

    # surest first: 0.95 right, 0.1 right, 0.3 wrong, 0.4 right, 0.45 wrong
    assert found["coverage"] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert found["risk"] == pytest.approx([0, 0, 1 / 3, 1 / 4, 2 / 5], abs=1e-5)


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    random = np.random.default_rng(0)
    truth, probability = (random.random(2000) < 0.5).astype(float), random.random(2000)

    roc = curves(truth, probability)["roc"]

    assert len(roc["fpr"]) <= 200
    assert (roc["fpr"][0], roc["tpr"][0], roc["fpr"][-1], roc["tpr"][-1]) == (0.0, 0.0, 1.0, 1.0)
