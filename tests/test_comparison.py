import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from models.heads.comparison import Answers, compare, delong


def slow_delong(truth, a, b):
    """DeLong et al. 1988, Eq. 4 to 6, pair by pair: the difference and its variance."""
    positives, negatives = np.flatnonzero(truth == 1), np.flatnonzero(truth == 0)
    components = []
    for score in (a, b):
        kernel = np.array([[(score[i] > score[j]) + (score[i] == score[j]) / 2 for j in negatives] for i in positives])
        components.append((kernel.mean(), kernel.mean(axis=1), kernel.mean(axis=0)))
    (area_a, x_a, y_a), (area_b, x_b, y_b) = components
    m, n = len(positives), len(negatives)

    def covariance(u, v):
        return sum((p - u.mean()) * (q - v.mean()) for p, q in zip(u, v, strict=True)) / (len(u) - 1)

    variance = sum(
        sign * (covariance(x, x2) / m + covariance(y, y2) / n)
        for sign, x, x2, y, y2 in ((1, x_a, x_a, y_a, y_a), (1, x_b, x_b, y_b, y_b), (-2, x_a, x_b, y_a, y_b))
    )
    return area_a - area_b, variance


def scores(seed=0, rows=60, ties=False):
    random = np.random.default_rng(seed)
    truth = (np.arange(rows) % 3 == 0).astype(float)
    a, b = (truth * gain + random.normal(size=rows) for gain in (1.5, 0.5))
    return truth, *((each.round() if ties else each) for each in (a, b))


@pytest.mark.parametrize("ties", [False, True])
def test_delong_is_the_published_covariance(ties):
    truth, a, b = scores(ties=ties)

    found = delong(truth, a, b)

    difference, variance = slow_delong(truth, a, b)
    assert (found["a"], found["b"]) == pytest.approx((roc_auc_score(truth, a), roc_auc_score(truth, b)))
    assert found["difference"] == pytest.approx(difference)
    assert found["z"] == pytest.approx(difference / variance**0.5)
    assert found["p"] == pytest.approx(2 * norm.sf(abs(difference) / variance**0.5))
    assert found["interval_95"] == pytest.approx([difference + s * 1.959964 * variance**0.5 for s in (-1, 1)])


def test_delong_on_an_example_worked_by_hand():
    truth = np.array([1.0, 1, 1, 0, 0])
    a, b = np.array([3.0, 2, 1, 0, 1.5]), np.array([3.0, 1, 2, 0, 2.5])

    found = delong(truth, a, b)

    # pairs won of 6: a 5 (the positive 1 loses to 1.5), b 4 (1 and 2 lose to 2.5)
    assert (found["a"], found["b"]) == pytest.approx((5 / 6, 4 / 6))
    # by positive: a (1, 1, 1/2), b (1, 1/2, 1/2); by negative: a (1, 2/3), b (1, 1/3)
    # differences by positive (0, 1/2, 0): variance 1/12 over 3; by negative (0, 1/3): variance 1/18 over 2
    assert found["z"] == pytest.approx((1 / 6) / np.sqrt(1 / 36 + 1 / 36))


def test_a_score_is_no_better_than_itself_or_its_square():
    truth, a, _ = scores()
    positive = np.exp(a)

    found = delong(truth, positive, positive**2)

    assert (found["difference"], found["z"], found["p"]) == (0.0, 0.0, 1.0)


def test_delong_finds_a_difference_as_often_as_its_level_says():
    rejected = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        truth = (np.arange(80) % 2).astype(float)
        shared = truth + random.normal(size=80)
        a, b = (shared + random.normal(size=80) for _ in range(2))  # equally good
        rejected += delong(truth, a, b)["p"] < 0.05
    assert 0.02 < rejected / 400 < 0.09


def answers(score):
    return Answers(1 / (1 + np.exp(-score)), score > 0)


def test_a_comparison_is_the_difference_of_every_metric_on_the_same_draws():
    truth, a, b = scores()

    found = compare(truth, answers(a), answers(b), np.arange(60), 0.9, seed=0)

    assert (found["bags"], found["patients"]) == (60, 60)
    for name in ("auroc", "auprc", "f1", "brier"):
        low, high = found[name]["interval_95"]
        assert found[name]["difference"] == pytest.approx(found[name]["a"] - found[name]["b"], abs=1.5e-4)
        assert low < found[name]["difference"] < high
    assert found["auroc"]["difference"] == found["delong"]["difference"]
    np.testing.assert_allclose(found["auroc"]["interval_95"], found["delong"]["interval_95"], atol=0.06)
    assert abs(found["auroc"]["p"] - found["delong"]["p"]) < 0.05


def test_turned_round_it_is_the_same_with_the_other_sign():
    truth, a, b = scores()
    one = compare(truth, answers(a), answers(b), np.arange(60), 0.9, seed=0)

    other = compare(truth, answers(b), answers(a), np.arange(60), 0.9, seed=0)

    assert other["auroc"]["difference"] == -one["auroc"]["difference"]
    assert other["auroc"]["interval_95"] == [-edge for edge in reversed(one["auroc"]["interval_95"])]
    assert other["delong"]["p"] == one["delong"]["p"]


def test_delong_is_not_told_of_patients_with_several_rows():
    truth, a, b = scores()

    found = compare(truth, answers(a), answers(b), np.arange(60) // 2, 0.9, seed=0)

    assert found["delong"] is None
    assert found["patients"] == 30


def test_rows_of_unknown_truth_are_left_out_and_one_class_compares_to_nothing():
    truth, a, b = scores()
    partly = np.where(np.arange(60) < 30, truth, np.nan)

    found = compare(partly, answers(a), answers(b), np.arange(60), 0.9, seed=0)

    half = compare(truth[:30], answers(a[:30]), answers(b[:30]), np.arange(30), 0.9, seed=0)
    assert found == half
    assert compare(np.ones(60), answers(a), answers(b), np.arange(60), 0.9, seed=0) is None
