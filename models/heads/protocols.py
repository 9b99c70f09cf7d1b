"""Which bags train, validate and test which head: folds by patient, stratified where that can be."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from models.heads.options import HeadOptions

TRAIN, TEST = -1, -2  # beside the numbers of folds
NAMES = {TRAIN: "train", TEST: "test"}

Rows = NDArray[np.int64]


class TooFewPatients(Exception):
    """There are not enough patients of each class to hold some out."""


@dataclass(frozen=True)
class Parts:
    """What each row is to one ensemble: the fold that holds it out, TRAIN for all folds, or TEST for none."""

    of_row: Rows  # (rows,)

    @property
    def folds(self) -> int:
        return int(self.of_row.max()) + 1

    @property
    def test(self) -> Rows:
        return np.flatnonzero(self.of_row == TEST)

    def each(self) -> Iterator[tuple[Rows, Rows]]:
        """(train, validation) row numbers of every fold."""
        for fold in range(self.folds):
            train = (self.of_row != fold) & (self.of_row != TEST)
            yield np.flatnonzero(train), np.flatnonzero(self.of_row == fold)

    def named(self) -> list[str | int]:
        return [NAMES.get(int(part), int(part)) for part in self.of_row]


@dataclass(frozen=True)
class Plan:
    """The ensemble that is deployed, and the ones that only measure: those of nested cross-validation."""

    protocol: Literal["kfold", "nested", "holdout"]
    deployed: Parts
    outer: tuple[Parts, ...] = ()

    @property
    def networks(self) -> int:
        return sum(parts.folds for parts in (self.deployed, *self.outer))

    def named(self) -> dict[str, Any]:
        """As JSON; `planned` reads it again."""
        return {
            "protocol": self.protocol,
            "deployed": self.deployed.named(),
            "outer": [parts.named() for parts in self.outer],
        }


def planned(named: dict[str, Any]) -> Plan:
    """The plan that `Plan.named` wrote."""
    numbers: dict[Any, int] = {name: part for part, name in NAMES.items()}

    def parts(names: Sequence[str | int]) -> Parts:
        return Parts(np.array([numbers.get(name, name) for name in names], dtype=np.int64))

    return Plan(named["protocol"], parts(named["deployed"]), tuple(parts(names) for names in named["outer"]))


def plan(
    targets: NDArray[Any], patients: NDArray[Any], options: HeadOptions, split: Sequence[str] | None = None
) -> Plan:
    """Who is held out when.

    targets (rows, labels) of 0, 1 and NaN for unknown; patients (rows,) numbers; split (rows,) of `train`,
    `validation` and `test`, where the table says so. A test part stays out of all folds. With a validation part
    there is one head, without one there are folds of what is not test. Raises TooFewPatients.
    """
    if split is not None:
        chosen = np.array(split)
        if "validation" in split:
            fixed = np.select([chosen == "test", chosen == "validation"], [TEST, 0], TRAIN)
            return Plan("holdout", Parts(fixed))
        rest = np.flatnonzero(chosen != "test")
        return Plan("holdout", _folds_of(rest, targets, patients, options.folds, options.seed))
    every = np.arange(len(targets))
    if options.protocol == "kfold":
        return Plan("kfold", _folds_of(every, targets, patients, options.folds, options.seed))
    outer = []
    for number, (train, _) in enumerate(_folds_of(every, targets, patients, options.folds, options.seed).each()):
        outer.append(_folds_of(train, targets, patients, options.inner_folds, options.seed + 1 + number))
    deployed = _folds_of(every, targets, patients, options.inner_folds, options.seed)
    return Plan("nested", deployed, tuple(outer))


def _folds_of(rows: Rows, targets: NDArray[Any], patients: NDArray[Any], folds: int, seed: int) -> Parts:
    """Folds of these rows; all others are TEST."""
    of_row = np.full(len(targets), TEST)
    of_row[rows] = stratified_folds(targets[rows], patients[rows], folds, seed)
    return Parts(of_row)


def stratified_folds(targets: NDArray[Any], patients: NDArray[Any], folds: int, seed: int) -> Rows:
    """The fold (rows,) that holds each row out: grouped by patient, every label and value spread evenly.

    There are fewer folds where a class has fewer patients. Raises TooFewPatients where one has a single patient.
    """
    smallest = min(_class_sizes(targets, patients))
    if smallest < 2:
        raise TooFewPatients(
            f"{len(np.unique(patients))} patients, of one class a single one; expected at least 2 of each class"
        )
    folds = min(folds, smallest)
    strata = np.unique(np.nan_to_num(targets, nan=2.0), axis=0, return_inverse=True)[1].reshape(-1)
    if min(len(np.unique(patients[strata == stratum])) for stratum in np.unique(strata)) < folds:
        return _iterative(targets, patients, folds, seed)
    answer = np.zeros(len(targets), dtype=np.int64)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fold, (_, validation) in enumerate(splitter.split(targets, strata, patients)):
        answer[validation] = fold
    if len(np.unique(answer)) < 2:  # patients with many bags can fill all of one fold
        return _iterative(targets, patients, folds, seed)
    return np.unique(answer, return_inverse=True)[1]  # without the numbers of folds that stayed empty


def _class_sizes(targets: NDArray[Any], patients: NDArray[Any]) -> list[int]:
    """How many patients have each value that each label takes."""
    return [
        len(np.unique(patients[column == value]))
        for column in targets.T
        for value in np.unique(column[~np.isnan(column)])
    ]


def _iterative(targets: NDArray[Any], patients: NDArray[Any], folds: int, seed: int) -> Rows:
    """Iterative stratification: rarest label first, each patient to the fold that lacks it most.

    Sechidis et al. 2011, "On the Stratification of Multi-Label Data", algorithm 1, over patients; a label's
    known absence counts as a label of its own.
    """
    random = np.random.default_rng(seed)
    names, number = np.unique(patients, return_inverse=True)
    has = np.zeros((len(names), 2 * targets.shape[1]), dtype=bool)
    for row, patient in enumerate(number):
        has[patient] |= np.concatenate([targets[row] == 1, targets[row] == 0])
    wanted = np.tile(has.sum(axis=0) / folds, (folds, 1))  # (folds, labels): how many are still missing
    room = np.full(folds, len(names) / folds)
    fold_of, waiting = np.full(len(names), -1), np.ones(len(names), dtype=bool)
    while waiting.any():
        left = has[waiting].sum(axis=0)
        rarest = int(np.where(left > 0, left, len(names) + 1).argmin())
        chosen = np.flatnonzero(waiting & has[:, rarest]) if left.any() else np.flatnonzero(waiting)
        for patient in random.permutation(chosen):
            lacking = wanted[:, rarest] if left.any() else room
            fold = np.lexsort((random.random(folds), -room, -lacking))[0]
            fold_of[patient], waiting[patient] = fold, False
            wanted[fold] -= has[patient]
            room[fold] -= 1
    return np.unique(fold_of[number], return_inverse=True)[1]
