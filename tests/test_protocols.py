import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.heads.options import HeadOptions
from models.heads.protocols import TEST, TRAIN, TooFewPatients, plan, planned, stratified_folds


@st.composite
def cohorts(draw):
    """(targets, patients): several bags a patient, unknown cells, two patients of each kind at least."""
    labels = draw(st.integers(1, 3))
    row = st.tuples(*[st.sampled_from([0.0, 1.0, float("nan")])] * labels)
    rows = draw(st.lists(row, min_size=2, max_size=6).filter(lambda rows: not np.isnan(rows).all()))
    patients = [each for each in rows for _ in range(draw(st.integers(2, 5)))]
    bags = [draw(st.integers(1, 4)) for _ in patients]
    owners = np.repeat(np.arange(len(patients)), bags)
    order = draw(st.permutations(range(len(owners))))
    return np.array(patients)[owners][order], owners[order]


@settings(max_examples=60, deadline=None)
@given(cohorts(), st.integers(2, 6), st.integers(0, 3))
def test_patients_never_straddle_a_split_and_each_bag_is_held_out_once(cohort, folds, seed):
    targets, patients = cohort

    parts = plan(targets, patients, HeadOptions(folds=folds, seed=seed)).deployed

    assert 2 <= parts.folds <= folds
    for train_rows, validation in parts.each():
        assert len(train_rows) and len(validation)
        assert not set(patients[train_rows]) & set(patients[validation])
        assert sorted([*train_rows, *validation]) == list(range(len(patients)))
    assert sorted(row for _, validation in parts.each() for row in validation) == list(range(len(patients)))


@settings(max_examples=30, deadline=None)
@given(cohorts(), st.integers(2, 4), st.integers(2, 4), st.integers(0, 3))
def test_nested_patients_are_tested_once_and_never_by_a_head_that_saw_them(cohort, folds, inner, seed):
    targets, patients = cohort
    options = HeadOptions(protocol="nested", folds=folds, inner_folds=inner, seed=seed)

    try:
        found = plan(targets, patients, options)
    except TooFewPatients:
        return  # an outer fold left a single patient of a class

    tested = [row for parts in found.outer for row in parts.test]
    assert sorted(tested) == list(range(len(patients)))
    for parts in found.outer:
        for train_rows, validation in parts.each():
            seen = set(patients[train_rows]) | set(patients[validation])
            assert not seen & set(patients[parts.test])
            assert not set(patients[train_rows]) & set(patients[validation])


def test_a_rare_label_is_in_every_fold_even_where_every_patient_is_of_a_kind_of_its_own():
    random = np.random.default_rng(0)
    targets = (random.random((60, 8)) < 0.3).astype(float)
    targets[:, 0] = np.arange(60) % 10 == 0  # six of sixty

    folds = stratified_folds(targets, np.arange(60), 3, seed=0)

    assert [int(targets[folds == fold, 0].sum()) for fold in range(3)] == [2, 2, 2]
    assert [int((folds == fold).sum()) for fold in range(3)] == [20, 20, 20]
    spread = np.array([targets[folds == fold].sum(axis=0) for fold in range(3)])
    assert (spread.max(axis=0) - spread.min(axis=0)).max() <= 3


def test_a_table_with_a_test_part_is_folded_without_it():
    targets, patients = np.array([[0.0], [1.0]] * 10), np.arange(20)
    split = ["test" if k < 6 else "train" for k in range(20)]

    parts = plan(targets, patients, HeadOptions(folds=3), split).deployed

    assert parts.test.tolist() == list(range(6))
    for train_rows, validation in parts.each():
        assert sorted([*train_rows, *validation]) == list(range(6, 20))


def test_a_validation_part_is_held_out_as_it_is():
    split = ["train", "test", "validation", "train", "validation"]

    found = plan(np.array([[0.0], [1.0], [0.0], [1.0], [1.0]]), np.arange(5), HeadOptions(), split)

    assert found.deployed.of_row.tolist() == [TRAIN, TEST, 0, TRAIN, 0]
    assert [(a.tolist(), b.tolist()) for a, b in found.deployed.each()] == [([0, 3], [2, 4])]


@pytest.mark.parametrize("protocol", ["kfold", "nested"])
def test_a_plan_survives_json(protocol):
    targets, patients = np.array([[0.0], [1.0]] * 10), np.arange(20)
    found = plan(targets, patients, HeadOptions(protocol=protocol, folds=3))

    again = planned(json.loads(json.dumps(found.named())))

    assert again.named() == found.named()
    assert np.array_equal(again.deployed.of_row, found.deployed.of_row)
    assert again.networks == found.networks


def test_another_seed_makes_other_folds_and_the_same_seed_the_same():
    targets, patients = np.array([[0.0], [1.0]] * 20), np.arange(40)
    options = HeadOptions(folds=4)

    found = [plan(targets, patients, replace(options, seed=seed)).named() for seed in (1, 1, 2)]

    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("rows", [[(0.0,), (1.0,)], [(0.0,), (0.0,), (0.0,), (1.0,)]], ids=["two", "one_positive"])
def test_a_single_patient_of_a_class_is_too_few(rows):
    with pytest.raises(TooFewPatients):
        plan(np.array(rows), np.arange(len(rows)), HeadOptions())


def test_many_bags_of_one_patient_are_still_one_patient():
    with pytest.raises(TooFewPatients):
        plan(np.array([[0.0], [1.0]] * 10), np.array([0, 1] * 10), HeadOptions())
