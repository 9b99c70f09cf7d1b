"""Training a head on stored bags: a plan of folds, an ensemble at the end, and the report of how good it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models.abmil import Ensemble
from models.heads.crossfit import Outcome, Rows, Train, Trained, run
from models.heads.loader import Bags
from models.heads.member import Member, train_member
from models.heads.options import Baseline, HeadOptions
from models.heads.probe import bag_means, train_probe
from models.heads.protocols import Plan
from models.heads.protocols import plan as make_plan
from models.heads.summary import Cohort, summary

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LabelledBag:
    patient: str  # bags of one patient never straddle a split
    target: tuple[float, ...]  # (labels,) of 0 and 1, NaN for unknown
    load: Callable[[], NDArray[np.float16]]  # -> (slices, windows, dim)


@dataclass(frozen=True)
class TrainedHead:
    ensemble: Ensemble
    report: dict[str, Any]


class Kept(Protocol):
    """Where trained networks are kept, by name, until all of a head are there. A dict will do."""

    def get(self, name: str, /) -> bytes | None: ...

    def __setitem__(self, name: str, network: bytes, /) -> None: ...


class _Progress:
    """Epochs done of epochs known, over all the networks of a training."""

    def __init__(self, networks: int, epochs: int, tell: Callable[[int, int], None]) -> None:
        self._known, self._epochs, self._tell = networks * epochs, epochs, tell
        self._started = 0

    def of_next(self) -> Callable[[int], None]:
        """For one network: a network that stops early leaves the rest of its epochs out."""
        before = self._started * self._epochs
        self._started += 1
        return lambda epoch: self._tell(before + epoch, self._known)


def train_head(
    bags: Sequence[LabelledBag],
    labels: Sequence[str],
    options: HeadOptions,
    on_epoch: Callable[[int, int], None],
    plan: Plan | None = None,
    split: Sequence[str] | None = None,
    kept: Kept | None = None,
) -> TrainedHead:
    """One network per fold of the plan, each from fresh seeded weights and stopped early on its own validation bags.

    `on_epoch(done, known)` is called after every epoch; what it raises ends the training. Without a plan there is
    one by `split`, the table's own train, validation and test (bags,), or by `options.protocol`. A network that is in
    `kept` is not trained again; it must be of the same bags, targets and options. The report is that of docs/heads.md
    as far as bags know it. Raises TooFewPatients, NotABag.
    """
    truth = np.array([bag.target for bag in bags], dtype=np.float64)  # (bags, labels)
    # Numbered in the table's order: opaque keys differ from service to service, splits must not.
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(bag.patient for bag in bags))}
    patients = np.array([numbers[bag.patient] for bag in bags])
    plan = plan or make_plan(truth, patients, options, split)
    read = Bags([bag.load for bag in bags])
    networked = sum(name != "probe" for name in options.baselines)
    progress = _Progress(plan.networks * (1 + networked + options.permutations), options.epochs, on_epoch)
    kept = {} if kept is None else kept
    outcome = run(plan, _networks("head", read, truth, options, progress, kept), truth, options)
    baselines: dict[str, Outcome] = {
        name: _baseline(name, plan, read, truth, options, progress, kept) for name in options.baselines
    }
    shuffled = []
    for draw in range(options.permutations):
        other = shuffled_labels(truth, patients, options.seed + draw)
        shuffled.append(
            (other, run(plan, _networks(f"shuffled {draw}", read, other, options, progress, kept), other, options))
        )
    cohort = Cohort(truth, patients, labels, read.shapes)
    networks = [member.network for member in outcome.deployed.members if isinstance(member, Member)]
    temperature = outcome.deployed.temperature
    ensemble = Ensemble(networks, options.one_of_n, [float(each) for each in temperature])
    return TrainedHead(ensemble.eval(), summary(cohort, plan, options, outcome, baselines, shuffled))


def _networks(name: str, bags: Bags, truth: Floats, options: HeadOptions, progress: _Progress, kept: Kept) -> Train:
    targets = torch.from_numpy(truth).float()

    def train(training: Rows, validation: Rows, number: int) -> Trained:
        on_epoch, key = progress.of_next(), f"{name} {number}"
        if found := kept.get(key):
            return Member.loaded(found, bags, targets.shape[1], options)
        member = train_member(bags, targets, training, validation, options, options.seed + number, on_epoch)
        kept[key] = member.saved()
        return member

    return train


def _baseline(
    name: Baseline, plan: Plan, bags: Bags, truth: Floats, options: HeadOptions, progress: _Progress, kept: Kept
) -> Outcome:
    """Another head on the same splits with the same options and seeds."""
    if name != "probe":
        other = replace(options, network=name)
        return run(plan, _networks(f"baseline {name}", bags, truth, other, progress, kept), truth, other)
    features = bag_means(bags)

    def train(training: Rows, validation: Rows, number: int) -> Trained:
        return train_probe(features, truth, training, validation, options.one_of_n, options.seed + number)

    return run(plan, train, truth, options)


def shuffled_labels(truth: Floats, patients: NDArray[Any], seed: int) -> Floats:
    """Labels (bags, labels) handed on from patient to patient at random, all of a patient's together.

    A patient with more bags than the giver repeats the giver's labels in turn.
    """
    order = np.random.default_rng(seed).permutation(int(patients.max()) + 1)

    @cache
    def rows_of(patient: int) -> Rows:
        return np.flatnonzero(patients == patient)

    answer = np.empty_like(truth)
    for patient, giver in enumerate(order):
        given = rows_of(int(giver))
        for turn, row in enumerate(rows_of(patient)):
            answer[row] = truth[given[turn % len(given)]]
    return answer
