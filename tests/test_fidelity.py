"""The figures of fidelity against slow loops, and a whole small run on synthetic patients."""

import json
import os
import signal
import threading
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from bench.bags import Ground, kept_bags, make_bags
from bench.embeddings import Embeddings
from bench.entries import Entry, Histogram
from bench.fidelity import summary
from bench.folds import train_fold
from bench.intervals import auroc, mean, ratio
from bench.material import Material, Plan, dealt
from bench.measure import Measured, Rows, kept_measures, measure, name_of
from bench.patients import Series, Single
from bench.pooling import chance_of_hit, hit, mass_over_uniform, rank
from bench.probe import STRENGTHS, probe_scores
from bench.regions import Axis, lung_axis, region_errors
from models.ct.phantom import Identity, chest, write_series
from models.ct.slices import encoder_input
from models.exported import exported


def test_auroc_counts_pairs_of_one_run_only():
    random = np.random.default_rng(0)
    truth, score = random.random(60) < 0.4, random.integers(0, 8, 60)
    patients, run = random.choice(list("abcde"), 60), random.choice(["first", "second"], 60)
    wins, pairs = 0.0, 0
    for i in range(60):
        for j in range(60):
            if truth[i] and not truth[j] and run[i] == run[j]:
                wins += 1.0 if score[i] > score[j] else 0.5 if score[i] == score[j] else 0.0
                pairs += 1

    found = auroc(truth, score, patients, run)

    assert found.value == pytest.approx(wins / pairs)
    assert found.low < found.value < found.high


def test_intervals_resample_patients():
    alone = auroc([1, 0, 1, 0], [3, 2, 1, 0], ["one"] * 4, ["run"] * 4)
    apart = mean([1.0] * 50 + [0.0] * 50, ["one"] * 50 + ["other"] * 50)

    assert (alone.low, alone.value, alone.high) == (0.75, 0.75, 0.75)
    assert (apart.low, apart.value, apart.high) == (0.0, 0.5, 1.0)  # a hundred slices of two patients are two cases
    assert ratio([1, 2], [4, 4], ["one", "other"]).value == 3 / 8
    assert np.isnan(auroc([1, 1], [0, 1], ["one", "other"], ["run"] * 2).value)


def test_two_copies_of_a_patient_make_no_pair_of_patients():
    truth = np.array([1, 0, 1, 0, 1, 0])
    score, owner = np.array([2, 0, 4, 3, 1, 0]), np.array([0, 0, 1, 1, 2, 2])
    found = []
    for draw in product(range(3), repeat=3):
        wins = pairs = 0.0
        for i, first in enumerate(draw):
            for j, second in enumerate(draw):
                if i == j or first != second:
                    for positive in score[(owner == first) & (truth == 1)]:
                        for negative in score[(owner == second) & (truth == 0)]:
                            wins += 1.0 if positive > negative else 0.5 if positive == negative else 0.0
                            pairs += 1
        found.append(wins / pairs)

    interval = auroc(truth, score, owner, [0] * 6)

    # Of 27 draws each is likelier than 2.5 %, so that the interval spans them all.
    assert (interval.low, interval.high) == (pytest.approx(min(found)), pytest.approx(max(found)))


def test_the_chance_of_a_hit_is_the_share_of_all_draws():
    draws = [set(draw) for draw in combinations(range(12), 5)]

    assert chance_of_hit(12, 2, 5) == pytest.approx(np.mean([bool(draw & {3, 4}) for draw in draws]))
    assert chance_of_hit(12, 8, 5) == 1.0


def test_attention_is_judged_by_slice():
    attention = np.array([0.1, 0.4, 0.05, 0.3, 0.15])

    assert [hit(attention, (3,), first) for first in (1, 2)] == [False, True]
    assert rank(attention, (2, 4)) == 3
    assert mass_over_uniform(attention, (1, 3)) == pytest.approx(0.7 / (2 / 5))
    assert mass_over_uniform(np.full(9, 1 / 9), (1, 3)) == pytest.approx(1.0)


def test_a_probe_with_more_features_than_slices_is_the_plain_one():
    random = np.random.default_rng(0)
    truth = random.random(50) < 0.5
    train, test = random.normal(size=(50, 90)) + truth[:, None] * 0.3, random.normal(size=(20, 90))
    train[:, 5], test[:, 5] = 2.0, 7.0  # a constant says nothing, whatever it is elsewhere
    scaler = StandardScaler().fit(train)
    plain = [
        LogisticRegression(C=strength, max_iter=2000).fit(scaler.transform(train)[:, np.arange(90) != 5], truth)
        for strength in STRENGTHS
    ]

    found = probe_scores(train, truth, np.array(list("abcde") * 10), test, seed=0)

    expected = [each.decision_function(scaler.transform(test)[:, np.arange(90) != 5]) for each in plain]
    assert min(np.abs(found - each).max() for each in expected) < 0.01


def test_region_errors_are_those_of_a_double_loop():
    random = np.random.default_rng(0)
    query, other = random.normal(size=(12, 5)).astype(np.float32), random.normal(size=(9, 5)).astype(np.float32)
    ours = Axis(np.arange(12)[::-1] * 5.0, np.arange(12) < 10)
    theirs = Axis(np.arange(9)[::-1] * 4.0, np.ones(9, bool))
    errors, chances = [], []
    for k in range(12):
        if ours.in_lung[k] and 0 <= ours.depth_mm[k] <= 32:
            cosines = [query[k] @ each / np.linalg.norm(query[k]) / np.linalg.norm(each) for each in other]
            errors.append(abs(theirs.depth_mm[int(np.argmax(cosines))] - ours.depth_mm[k]))
            chances.append(np.mean([abs(depth - ours.depth_mm[k]) for depth in theirs.depth_mm]))

    found = region_errors(query, ours, other, theirs)

    np.testing.assert_allclose(found[0], errors)
    np.testing.assert_allclose(found[1], chances)


def test_patients_are_dealt_into_folds_once():
    volumes = ["lidc-a", "lidc-b", "c", "d", "d", "e", "f"]

    folds = dealt(volumes, 3, [f"single-{k}" for k in range(10)])

    assert Counter(patient for fold in folds for patient in fold) == Counter(
        {*volumes} | {f"single-{k}" for k in range(10)}
    )
    assert not any({"lidc-a", "lidc-b"} <= fold for fold in folds)
    assert [len(fold) for fold in folds] == [6, 5, 5]


SMALL = """
[[data.sources]]
kind = "archive"
path = "ct"
[encoder]
base = "test_mambaout"
start = "random"
[views]
size = 64
[objectives]
planting = 1
[run]
output = "run"
steps = 40
batch = 2
workers = 0
checkpoint_every = 2
"""


def patient(number: int) -> Series:
    phantom = chest(seed=number, lesion=False, slices=28, size=96)
    hu = np.round(phantom.hu).astype(np.int16)
    return Series(f"series-{number}", f"patient-{number}", hu, np.arange(28) * 10.0, phantom.spacing_mm)


@pytest.fixture(scope="module")
def series():
    return [patient(number) for number in range(6)]


@pytest.fixture(scope="module")
def plans(series):
    random = np.random.default_rng(0)
    return [Plan(each.name, each, make_bags(Ground(each), 8, random)) for each in series]


def test_bags_come_in_pairs_that_differ_by_one_lesion_only(plans):
    for plan in plans:
        assert plan.bags
        for bag, partner in zip(plan.bags[::2], plan.bags[1::2], strict=True):
            assert bag.slices == partner.slices
            assert bag.conspicuous == partner.conspicuous
            assert 1 <= len(bag.lesion) <= len(bag.slices) / 10
            assert len(bag.planted) == len(bag.changed)
            assert not partner.positive
            assert not partner.changed
    kinds = [bag.conspicuous for plan in plans for bag in plan.bags]
    assert 0 < sum(kinds) < len(kinds)


def test_slices_with_a_real_nodule_are_in_no_bag(series):
    known = Series(**{**vars(series[0]), "suspect_slices": (9, 10, 11)})

    bags = make_bags(Ground(known), 6, np.random.default_rng(0))

    assert not {9, 10, 11} & {slice for bag in bags for slice in bag.slices}


def test_kept_bags_are_those_that_were_made(plans, tmp_path):
    first = kept_bags(tmp_path / "bags.npz", lambda: plans[0].bags)
    again = kept_bags(tmp_path / "bags.npz", lambda: [])

    for bag, made in zip(again, plans[0].bags, strict=True):
        assert vars(bag) | {"planted": None} == vars(made) | {"planted": None}
        assert (bag.planted is None) == (made.planted is None)
        if bag.planted is not None:
            np.testing.assert_array_equal(bag.planted, made.planted)
    assert len(first) == len(again)


def test_only_changed_slices_are_embedded_anew_and_only_once(plans, tmp_path):
    encoded: list[int] = []

    class Counting(Histogram):
        def encode(self, slices):
            encoded.append(len(slices))
            return super().encode(slices)

    plan = plans[0]
    bag = plan.bags[0]
    whole = plan.series.hu[list(bag.slices)].astype(np.float32)
    whole[list(bag.changed)] = bag.planted
    encoder = Counting(input_size=64)
    expected = encoder.encode(np.stack([encoder_input(hu, encoder.windows, 64) for hu in whole]))
    encoded.clear()

    found = Embeddings(encoder, tmp_path, lambda done: None).bags(plan.name, plan.bags, plan.series)
    again = Embeddings(encoder, tmp_path, lambda done: None).bags(plan.name, plan.bags, plan.series)

    np.testing.assert_allclose(found[0], expected, atol=1e-3)  # kept as float16
    assert sum(encoded) == 28 + sum(len(bag.changed) for bag in plan.bags)
    for first, second in zip(found, again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_depth_is_counted_from_the_top_of_the_lungs(series):
    ground = Ground(series[0])
    area = ground.tissue.lung.sum(axis=(1, 2)) * ground.series.spacing_mm[1] ** 2
    apex = max(k for k in range(28) if area[k] >= 1000)

    axis = lung_axis(ground.series, ground.tissue)
    cut = Series(**{**vars(series[0]), "hu": series[0].hu[: apex + 1], "z_mm": series[0].z_mm[: apex + 1]})

    assert axis.depth_mm[apex] == 0
    assert axis.depth_mm[apex - 3] == 30
    assert lung_axis(cut, ground.tissue.part(slice(0, apex + 1))) is None  # the top may lie above


def test_a_whole_run_asks_for_encoders_that_never_saw_the_patients(series, plans, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "models.heads.evaluation.BOOTSTRAP_DRAWS", 2
    )  # of the heads' own report, which nobody reads here
    random = np.random.default_rng(0)
    singles = [
        Single(f"single-{k % 9}", (random.normal(60 * (k % 2), 30, (96, 96))).astype(np.int16), bool(k % 2))
        for k in range(18)
    ]
    folds = dealt([each.patient for each in series], 2, [each.patient for each in singles])
    axes = {each.name: axis for each in series if (axis := lung_axis(each, Ground(each).tissue))}
    asked = []

    def encoder(held_out):
        asked.append(held_out)
        return Histogram(input_size=48)

    found = measure(
        Entry("tried", encoder),
        Material(series, singles, folds, {0: plans}, axes),
        tmp_path,
        lambda done: None,
        lambda: None,
    )

    figures = summary(found)
    assert asked == folds
    assert {"probe_auroc", "abmil_auroc", "hit_at_5", "chance_hit_at_5", "lesion_mass_over_uniform"} <= figures.keys()
    assert figures["contrast_auroc"] > 0.9
    assert figures["region_error_mm"] < figures["chance_region_error_mm"]
    assert json.loads(json.dumps(figures)) == figures


def test_a_training_that_is_stopped_makes_no_encoder_and_goes_on_where_it_was(tmp_path):
    config, seen = tmp_path / "small.toml", chest(seed=0, lesion=False, slices=6, size=64)
    config.write_text(SMALL)
    for patient in ("seen", "held out"):
        write_series(tmp_path / "unpacked" / patient, seen.hu, seen.spacing_mm, Identity(patient))

    def stop_after_the_first_steps():
        while not [*(tmp_path / "runs").rglob("*.pt")]:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_after_the_first_steps)
    stopper.start()
    with pytest.raises(KeyboardInterrupt):
        train_fold(config, frozenset(["held out"]), tmp_path)
    stopper.join()
    assert exported(tmp_path / "weights") == {}

    spec = train_fold(config, frozenset(["held out"]), tmp_path)

    assert exported(tmp_path / "weights") == {spec.name: spec}
    assert "40 steps" in (tmp_path / "weights" / spec.name / "MODEL_CARD.md").read_text()


def test_what_was_measured_is_not_measured_again_unless_something_that_decides_it_is_another(tmp_path):
    held_out, asked = frozenset("A"), []

    def encoder(patients):
        asked.append(patients)
        raise LookupError

    def run(answer):
        answer.rows["probe_auroc/all"].add([True, False], [1 / 3, 0.25], ["A", "B"], "0/0")
        answer.values["hit_at_1/all"].append(("A", 1.0))
        answer.ranks["A"].append(3)

    entry = Entry("tried", encoder, recipe="steps = 1")
    material = Material([], [], [held_out], {}, {})
    part = tmp_path / name_of("tried-0-real", ["tried", "steps = 1", ["A"], []])
    kept_measures(part, run)

    found = measure(entry, material, tmp_path, lambda done: None, lambda: None, tmp_path)

    assert asked == []
    assert found.rows["probe_auroc/all"] == Rows([True, False], [0.333333, 0.25], ["A", "B"], ["0/0", "0/0"])
    assert (found.values["hit_at_1/all"], found.ranks["A"]) == ([("A", 1.0)], [3])
    for other in (replace(entry, recipe="steps = 2"), replace(entry, name="other")):
        with pytest.raises(LookupError):
            measure(other, material, tmp_path, lambda done: None, lambda: None, tmp_path)


def test_measures_of_folds_add_up():
    one, two = Measured(), Measured()
    one.rows["auroc"].add([True], [0.5], ["A"], "0")
    two.rows["auroc"].add([False], [0.25], ["B"], "1")
    two.values["hit"].append(("B", 1.0))

    one.add(two)

    assert one.rows["auroc"] == Rows([True, False], [0.5, 0.25], ["A", "B"], ["0", "1"])
    assert one.values["hit"] == [("B", 1.0)]
