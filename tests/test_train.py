import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.heads import evaluation, loader
from models.heads.options import HeadOptions
from models.heads.protocols import TooFewPatients, plan
from models.heads.train import LabelledBag, shuffled_labels, train_head

DIM, SLICES, WINDOWS = 8, 6, 2
FAST = HeadOptions(folds=2, epochs=6, patience=3, batch_size=16, learning_rate=3e-3)


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "BOOTSTRAP_DRAWS", 20)
        yield


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


def train(bags, options, **rest):
    """The trained head, and (done, known) of every epoch."""
    epochs, labels = [], ["disease", "other", "third"][: len(bags[0].target)]
    return train_head(bags, labels, options, lambda done, known: epochs.append((done, known)), **rest), epochs


def splits(bags, options):
    """(train, validation) rows of each fold of the deployed head."""
    return list(plan(*arrays(bags), options).deployed.each())


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
    trained, _ = train(bags, replace(FAST, folds=3, epochs=30, patience=8))
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
    for (_, validation), head in zip(splits(bags, options), trained.ensemble.heads, strict=True):
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


def test_splits_follow_the_order_of_patients_and_not_their_opaque_keys():
    bags = cohort(12, bags_each=2)
    renamed = [replace(bag, patient=bag.patient[::-1]) for bag in bags]

    assert weights(train(renamed, FAST)[0]) == weights(train(bags, FAST)[0])


def test_there_are_no_more_folds_than_patients_of_the_smaller_class():
    bags = [bag for k, bag in enumerate(cohort(40)) if bag.target == (0.0,) or k < 6]

    trained, _ = train(bags, replace(FAST, folds=5, epochs=1))

    assert len(trained.report["folds"]) == 3
    assert [each["code"] for each in trained.report["warnings"]] == ["fewer_folds"]


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
        splits(bags, FAST), trained.ensemble.heads, trained.report["folds"], strict=True
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


def with_labels(bags, column):
    """The same bags with one label more."""
    return [replace(bag, target=(*bag.target, each)) for bag, each in zip(bags, column, strict=True)]


def test_an_unknown_label_of_a_bag_changes_no_gradient_and_no_figure_of_that_label():
    bags, nan = cohort(24), float("nan")
    known = with_labels(bags, [0.0, 1.0] * 6 + [nan] * 12)
    one, _ = train(known, FAST)

    known_rows = one.report["validation"]["other"]
    assert (known_rows["bags"], known_rows["positives"]) == (12, 6)
    assert one.report["cohort"]["labels"]["other"] == {"positive": 6, "negative": 6, "unknown": 12}
    assert all(np.isfinite(each).all() for each in map(np.array, weights(one).values()))


def test_a_label_that_is_nowhere_known_leaves_its_own_weights_to_decay_alone():
    bags = with_labels(cohort(12), [float("nan")] * 12)
    options = replace(FAST, epochs=2, weight_decay=0.0)
    torch.manual_seed(options.seed)
    from models.abmil import ABMIL

    fresh = ABMIL(DIM, 2).head[-1].weight[1].tolist()

    trained, _ = train(bags, options)

    assert trained.ensemble.heads[0].head[-1].weight[1].tolist() == fresh
    assert trained.report["validation"]["other"]["auroc"] is None


def test_a_held_out_test_part_is_seen_by_nothing_that_is_chosen():
    bags, random = cohort(30), np.random.default_rng(1)
    split = ["test" if k >= 20 else "" for k in range(30)]
    noise = [random.normal(size=(SLICES, WINDOWS, DIM)).astype(np.float16) for _ in range(30)]
    spoiled = [
        replace(bag, target=(1 - bag.target[0],), load=lambda k=k: noise[k]) if split[k] else bag
        for k, bag in enumerate(bags)
    ]

    honest, _ = train(bags, FAST, split=split)
    other, _ = train(spoiled, FAST, split=split)

    assert weights(other) == weights(honest)
    for key in ("folds", "validation", "operating"):
        assert other.report[key] == honest.report[key]
    assert other.report["test"] != honest.report["test"]
    assert (honest.report["evaluated"], honest.report["protocol"]) == ("test", "holdout")
    assert honest.report["cohort"]["parts"]["test"] == {"patients": 10, "bags": 10}


def test_a_test_bags_probability_is_the_deployed_ensembles():
    bags = cohort(30)
    trained, _ = train(bags, FAST, split=["test" if k >= 24 else "train" for k in range(30)])

    said = trained.report["rows"]["test"]["disease"]["probability"]
    with torch.inference_mode():
        expected = [float(trained.ensemble(torch.from_numpy(b.load()).float().flatten(0, 1))[0]) for b in bags[24:]]
    assert said[:24] == [None] * 24
    np.testing.assert_allclose(said[24:], expected, atol=1e-5)


def test_a_validation_part_makes_one_head_that_stops_by_it():
    split = ["train"] * 16 + ["validation"] * 8 + ["test"] * 6

    trained, _ = train(cohort(30), FAST, split=split)

    assert [(fold["train_bags"], fold["validation_bags"]) for fold in trained.report["folds"]] == [(16, 8)]
    assert trained.report["splits"]["deployed"] == ["train"] * 16 + [0] * 8 + ["test"] * 6


def test_nested_folds_test_every_patient_once_by_heads_that_did_not_see_them():
    trained, epochs = train(cohort(18), replace(FAST, protocol="nested", folds=3, inner_folds=2, epochs=2))

    outer = trained.report["splits"]["outer"]
    assert [sum(parts[row] == "test" for parts in outer) for row in range(18)] == [1] * 18
    assert all(None is not each for each in trained.report["rows"]["test"]["disease"]["probability"])
    assert [len(each["folds"]) for each in trained.report["outer_folds"]] == [2, 2, 2]
    assert len(trained.ensemble.heads) == 2
    assert epochs[-1] == (16, 16)  # (2 deployed + 3 * 2) networks of 2 epochs


def test_a_plan_given_is_the_plan_used():
    bags = cohort(12)
    other = plan(*arrays(bags), replace(FAST, seed=5))

    trained, _ = train(bags, FAST, plan=other)

    assert trained.report["splits"] == other.named()


def test_baselines_are_trained_on_the_same_splits_and_leave_the_head_as_it_was():
    bags = cohort(24)
    names = ["mean", "max", "gated_abmil", "probe", "abmil"]

    alone, _ = train(bags, FAST)
    beside, epochs = train(bags, replace(FAST, baselines=names))

    assert weights(beside) == weights(alone)
    assert [*beside.report["baselines"]] == names
    assert epochs[-1][1] == 2 * FAST.epochs * 5  # the probe has no epochs
    again = beside.report["baselines"]["abmil"]  # the same network on the same splits with the same seeds
    assert again["validation"]["disease"]["auroc"] == beside.report["validation"]["disease"]["auroc"]
    assert again["comparison"]["disease"]["auroc"]["difference"] == 0.0
    assert again["comparison"]["disease"]["delong"]["p"] == 1.0


def test_labels_are_shuffled_among_patients_all_of_a_patients_together():
    patients = np.repeat(np.arange(6), 2)
    truth = np.array([[k // 2, k % 2] for k in range(12)], dtype=float)  # first the patient, then which bag of theirs

    shuffled = shuffled_labels(truth, patients, seed=3)

    givers = shuffled[::2, 0]
    assert sorted(givers) == list(range(6))
    assert list(givers) != list(range(6))
    assert np.array_equal(shuffled[1::2, 0], givers)
    assert np.array_equal(shuffled[:, 1], truth[:, 1])


def test_on_shuffled_labels_a_strong_signal_is_gone(separable):
    bags, _ = separable
    options = replace(FAST, folds=3, epochs=12, permutations=1)

    found, _ = train(bags, options)

    chance = found.report["permutation"]["auroc"]["disease"]
    assert found.report["permutation"]["draws"] == 1
    assert chance["expected_std"] == pytest.approx(math.sqrt(61 / (12 * 30 * 30)), abs=1e-4)  # Mann and Whitney
    assert abs(chance["values"][0] - 0.5) < 4 * chance["expected_std"]
    assert found.report["warnings"] == []


def test_a_patient_of_many_bags_counts_once_in_the_deviation_of_chance():
    options = replace(FAST, folds=3, epochs=1, permutations=1)
    once, _ = train(cohort(24), options)
    twice, _ = train(cohort(24) * 2, options)

    deviations = [
        each.report["permutation"]["auroc"][label]["expected_std"]
        for each in (once, twice)
        for label in each.report["permutation"]["auroc"]
    ]
    assert len(set(deviations)) == 1


@pytest.mark.parametrize("network", ["gated_abmil", "mean", "max"])
def test_any_network_can_be_the_head(network):
    trained, _ = train(cohort(12), replace(FAST, network=network, epochs=1, hidden=16, attention=4))

    assert {type(head).__name__ for head in trained.ensemble.heads} == {
        {"gated_abmil": "GatedABMIL", "mean": "MeanPooling", "max": "MaxPooling"}[network]
    }


def test_a_bag_is_read_again_and_again_where_memory_is_full_and_gives_the_same_head(monkeypatch):
    bags = cohort(12)
    expected, _ = train(bags, FAST)
    reads = []
    counted = [replace(bag, load=lambda bag=bag, k=k: reads.append(k) or bag.load()) for k, bag in enumerate(bags)]

    monkeypatch.setattr(loader, "KEEP_BYTES", 3 * SLICES * WINDOWS * DIM * 2)  # three bags of float16
    trained, _ = train(counted, FAST)

    assert weights(trained) == weights(expected)
    assert [reads.count(k) for k in range(3)] == [1, 1, 1]
    assert all(reads.count(k) > 6 for k in range(3, 12))


def test_a_batch_in_several_chunks_takes_the_step_of_the_whole_batch(monkeypatch):
    bags = cohort(12)
    options = replace(FAST, dropout=0.0, epochs=2)
    expected, _ = train(bags, options)

    monkeypatch.setattr(loader, "CHUNK_INSTANCES", 2 * SLICES * WINDOWS)
    trained, _ = train(bags, options)

    for name, tensor in expected.ensemble.state_dict().items():
        torch.testing.assert_close(trained.ensemble.state_dict()[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize(
    ("bag", "found"),
    [
        (np.zeros((4, 2, DIM + 1), np.float16), f"(4, 2, {DIM + 1})"),
        (np.full((4, 2, DIM), np.nan, np.float16), "NaN"),
        (np.zeros((0, 2, DIM), np.float16), "(0, 2"),
    ],
    ids=["other_encoder", "nan", "empty"],
)
def test_a_bag_that_is_none_of_this_encoders_is_named(bag, found):
    bags = cohort(6)
    bags[3] = replace(bags[3], load=lambda: bag)

    with pytest.raises(loader.NotABag, match=re.escape(found)):
        train(bags, FAST)


def test_what_the_watcher_raises_ends_the_training():
    class Cancelled(Exception):
        pass

    def cancel(done, known):
        raise Cancelled

    with pytest.raises(Cancelled):
        train_head(cohort(6), ["disease"], FAST, cancel)
