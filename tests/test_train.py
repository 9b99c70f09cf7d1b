from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.heads.train import HeadOptions, LabelledBag, TooFewPatients, _splits, train_head

DIM, SLICES, WINDOWS = 8, 6, 2
FAST = HeadOptions(folds=2, epochs=6, patience=3, batch_size=16, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    yield
    torch.set_num_threads(before)


def cohort(patients, signal=6.0, classes=1, bags_each=1, seed=0):
    """Bags of noise; one instance of a positive bag lies `signal` away, along an axis of the class's own.

    With several classes each patient is of one of them.
    """
    random = np.random.default_rng(seed)
    bags = []
    for patient in range(patients):
        kind = patient % max(2, classes)
        target = tuple(float(kind == k) for k in range(classes)) if classes > 1 else (float(kind),)
        for _ in range(bags_each):
            bag = random.normal(size=(SLICES, WINDOWS, DIM))
            if classes > 1 or kind:
                bag[random.integers(SLICES), random.integers(WINDOWS), kind] += signal
            stored = bag.astype(np.float16)
            bags.append(LabelledBag(f"patient {patient}", target, lambda stored=stored: stored))
    return bags


def train(bags, options, labels=()):
    """The trained head, and (done, known) of every epoch; figures, which take seconds, of the named labels."""
    epochs = []
    return train_head(bags, labels, options, lambda done, known: epochs.append((done, known))), epochs


def weights(trained):
    return {name: tensor.tolist() for name, tensor in trained.ensemble.state_dict().items()}


def logit_of(head, bag):
    instances = torch.from_numpy(bag.load()).float().flatten(0, 1)
    with torch.inference_mode():
        return head(instances.unsqueeze(0), torch.ones(1, len(instances), dtype=torch.bool))[0].item()


def arrays(bags):
    targets = np.array([bag.target for bag in bags], dtype=np.float32)
    return targets, np.array([int(bag.patient.split()[1]) for bag in bags])


@pytest.fixture(scope="module")
def separable():
    """Sixty bags that one instance decides, and the head trained on them."""
    bags = cohort(60)
    trained, _ = train(bags, replace(FAST, folds=3, epochs=30, patience=8), labels=("disease",))
    return bags, trained


def test_what_can_be_told_apart_is_told_apart_on_held_out_patients(separable):
    _, trained = separable

    assert trained.report["validation"]["disease"]["auroc"]["value"] > 0.9
    assert (trained.report["patients"], trained.report["bags"]) == (60, 60)
    assert [fold["train_bags"] + fold["validation_bags"] for fold in trained.report["folds"]] == [60] * 3


def test_noise_is_not_told_apart_on_held_out_patients():
    bags = cohort(60, signal=0.0)
    options = replace(FAST, epochs=15, patience=15)  # long enough to know the training bags by heart
    trained, _ = train(bags, options)

    positives, negatives = [], []
    for (_, validation), head in zip(_splits(*arrays(bags), options), trained.ensemble.heads, strict=True):
        for row in validation:
            (positives if bags[row].target == (1.0,) else negatives).append(logit_of(head, bags[row]))
    assert 0.25 < np.mean([p > n for p in positives for n in negatives]) < 0.75


def test_attention_of_a_trained_head_lies_on_the_instance_that_decides(separable):
    bags, trained = separable
    positives = [torch.from_numpy(bag.load()).float().flatten(0, 1) for bag in bags if bag.target == (1.0,)]

    with torch.inference_mode():
        found = [int(trained.ensemble(bag)[1].argmax()) for bag in positives]

    hits = [at == int(bag[:, 1].argmax()) for at, bag in zip(found, positives, strict=True)]
    assert np.mean(hits) > 0.9


@st.composite
def cohorts(draw):
    """(targets, patients): several bags a patient, each patient of one class, two patients of each at least."""
    labels = draw(st.integers(1, 3))
    row = st.tuples(*[st.integers(0, 1)] * labels)
    rows = draw(st.lists(row, min_size=1, max_size=6))
    patients = [each for each in rows for _ in range(draw(st.integers(2, 5)))]
    bags = [draw(st.integers(1, 4)) for _ in patients]
    owners = np.repeat(np.arange(len(patients)), bags)
    order = draw(st.permutations(range(len(owners))))
    return np.array(patients, dtype=np.float32)[owners][order], owners[order]


@settings(max_examples=100, deadline=None)
@given(cohorts(), st.integers(2, 6), st.integers(0, 3))
def test_patients_never_straddle_a_split_and_each_bag_is_held_out_once(cohort, folds, seed):
    targets, patients = cohort

    splits = list(_splits(targets, patients, HeadOptions(folds=folds, seed=seed)))

    assert 2 <= len(splits) <= folds
    for train_rows, validation in splits:
        assert not set(patients[train_rows]) & set(patients[validation])
        assert sorted([*train_rows, *validation]) == list(range(len(patients)))
    assert sorted(row for _, validation in splits for row in validation) == list(range(len(patients)))


def test_splits_follow_the_order_of_patients_and_not_their_opaque_keys():
    bags = cohort(12, bags_each=2)
    renamed = [replace(bag, patient=bag.patient[::-1]) for bag in bags]

    assert weights(train(renamed, FAST)[0]) == weights(train(bags, FAST)[0])


def test_there_are_no_more_folds_than_patients_of_the_smaller_class():
    bags = [bag for k, bag in enumerate(cohort(40)) if bag.target == (0.0,) or k < 6]

    assert len(list(_splits(*arrays(bags), HeadOptions(folds=5)))) == 3


def test_training_stops_after_patience_and_keeps_the_best_epoch():
    options = replace(FAST, epochs=60, patience=4, learning_rate=1e-2)
    bags = cohort(30, signal=0.0)  # nothing to learn: the validation loss soon rises

    trained, epochs = train(bags, options)

    fold = trained.report["folds"][0]
    ran = max(done for done, _ in epochs if done <= options.epochs)
    assert ran == fold["best_epoch"] + options.patience < options.epochs
    # a run that ends at the best epoch ends with the weights that this one kept
    until_best, _ = train(bags, replace(options, epochs=fold["best_epoch"]))
    assert trained.ensemble.heads[0].state_dict().keys() == until_best.ensemble.heads[0].state_dict().keys()
    for name, tensor in until_best.ensemble.heads[0].state_dict().items():
        assert torch.equal(trained.ensemble.heads[0].state_dict()[name], tensor)


def test_the_reported_loss_is_that_of_the_kept_weights_on_the_held_out_patients():
    bags = cohort(30, signal=3.0)
    trained, _ = train(bags, FAST)

    for (_, validation), head, fold in zip(
        _splits(*arrays(bags), FAST), trained.ensemble.heads, trained.report["folds"], strict=True
    ):
        losses = []
        for row in validation:
            positive = 1 / (1 + np.exp(-logit_of(head, bags[row])))
            losses.append(-np.log(positive if bags[row].target == (1.0,) else 1 - positive))
        assert fold["validation_loss"] == pytest.approx(np.mean(losses), abs=2e-5)


def test_every_epoch_is_told_with_how_many_there_can_be():
    _, epochs = train(cohort(8), replace(FAST, epochs=2))

    assert epochs == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before():
    bags = cohort(12)
    torch.manual_seed(1)
    first, _ = train(bags, FAST)
    torch.manual_seed(2)
    again, _ = train(bags, FAST)
    another, _ = train(bags, replace(FAST, seed=1))

    assert weights(again) == weights(first)
    assert again.report == first.report
    assert weights(another) != weights(first)


def test_training_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(0)
    expected = torch.rand(3).tolist()

    torch.manual_seed(0)
    train(cohort(4), replace(FAST, epochs=1))

    assert torch.rand(3).tolist() == expected


def test_probabilities_of_one_of_n_sum_to_1_and_name_the_class():
    bags = cohort(60, classes=3)
    trained, _ = train(bags, replace(FAST, task="one_of_n", epochs=30, patience=8))

    with torch.inference_mode():
        answers = np.array([trained.ensemble(torch.from_numpy(b.load()).float().flatten(0, 1))[0] for b in bags])

    np.testing.assert_allclose(answers.sum(axis=1), 1.0, atol=1e-6)
    assert np.mean(answers.argmax(axis=1) == [np.argmax(bag.target) for bag in bags]) > 0.9


def test_a_trained_ensemble_is_ready_to_answer():
    trained, _ = train(cohort(6), FAST)

    assert not any(module.training for module in trained.ensemble.modules())


def test_one_patient_is_too_few():
    with pytest.raises(TooFewPatients):
        train(cohort(1, bags_each=5), FAST)


@pytest.mark.parametrize("rows", [[(0,), (1,)], [(0, 0), (0, 1), (1, 0), (1, 1)]], ids=["two", "four_kinds"])
def test_a_single_patient_of_each_class_is_too_few(rows):
    targets = np.array(rows, dtype=np.float32)

    with pytest.raises(TooFewPatients):
        list(_splits(targets, np.arange(len(rows)), HeadOptions()))
