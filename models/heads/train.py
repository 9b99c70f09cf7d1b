"""Training an ABMIL head on stored bags: folds by patient, early stopping, an ensemble at the end."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold
from torch import Tensor, nn

from models.abmil import ABMIL, Ensemble
from models.heads.metrics import evaluate


@dataclass(frozen=True)
class HeadOptions:
    """The paper's hyper-parameters by default."""

    task: Literal["multilabel", "one_of_n"] = "multilabel"
    folds: int = 5  # fewer where a class has fewer patients
    epochs: int = 32
    patience: int = 8  # epochs without improvement of the validation loss
    batch_size: int = 128  # bags
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2  # AdamW's default
    dropout: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class LabelledBag:
    patient: str  # bags of one patient never straddle a split
    target: tuple[float, ...]  # (labels,) of 0 and 1
    load: Callable[[], NDArray[np.float16]]  # -> (slices, windows, dim)


@dataclass(frozen=True)
class TrainedHead:
    ensemble: Ensemble
    report: dict[str, Any]


class TooFewPatients(Exception):
    """There are not enough patients of each class to hold some out."""


def train_head(
    bags: Sequence[LabelledBag], labels: Sequence[str], options: HeadOptions, on_epoch: Callable[[int, int], None]
) -> TrainedHead:
    """One ABMIL per fold, each from fresh seeded weights and stopped early on its own validation patients.

    `on_epoch(done, known)` is called after every epoch. The report's figures are those of each patient
    by the fold that did not train on them; that fold's early stopping saw them, so they are validation
    figures, not test figures. Raises TooFewPatients.
    """
    instances = [torch.from_numpy(bag.load()).flatten(0, 1) for bag in bags]  # each (N, D), float16
    targets = torch.tensor([bag.target for bag in bags])  # (bags, labels)
    # Numbered in the table's order: opaque keys differ from service to service, splits must not.
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(bag.patient for bag in bags))}
    patients = np.array([numbers[bag.patient] for bag in bags])
    splits = list(_splits(targets.numpy(), patients, options))
    heads, fold_reports = [], []
    held_out = np.full(targets.shape, np.nan)
    for fold, (train, validation) in enumerate(splits):

        def note(epoch: int, before: int = fold * options.epochs) -> None:
            on_epoch(before + epoch, len(splits) * options.epochs)

        head, fold_report = _train_fold(instances, targets, train, validation, options, fold, note)
        held_out[validation] = _probabilities(head, [instances[k] for k in validation], options)
        heads.append(head)
        fold_reports.append(fold_report)
    truth = targets.numpy().astype(np.float64)
    report = {
        "options": asdict(options),
        "patients": len(set(patients)),
        "bags": len(bags),
        "folds": fold_reports,
        "validation": {
            label: evaluate(truth[:, k], held_out[:, k], patients, options.seed) for k, label in enumerate(labels)
        },
        "note": "validation: each patient by the fold that did not train on them, whose early stopping saw them",
    }
    return TrainedHead(Ensemble(heads, options.task == "one_of_n").eval(), report)


def _splits(
    targets: NDArray[np.float32], patients: NDArray[Any], options: HeadOptions
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(train, validation) row numbers, grouped by patient, stratified by the whole row of labels where it can be."""
    strata = targets @ (2 ** np.arange(targets.shape[1]))
    sizes = [len(np.unique(patients[strata == stratum])) for stratum in np.unique(strata)]
    if max(sizes) < 2:
        raise TooFewPatients(
            f"{len(np.unique(patients))} patients, of no kind more than one; expected at least 2 of each"
        )
    folds = min(options.folds, len(np.unique(patients)), max(2, min(sizes)))
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=options.seed)
    for train, validation in splitter.split(targets, strata.astype(int), patients):
        if len(train) and len(validation):
            yield train, validation


def _train_fold(
    instances: list[Tensor],
    targets: Tensor,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    options: HeadOptions,
    fold: int,
    on_epoch: Callable[[int], None],
) -> tuple[ABMIL, dict[str, Any]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed + fold)
        head = ABMIL(instances[0].shape[1], targets.shape[1], dropout=options.dropout)
        optimizer = torch.optim.AdamW(head.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        best_loss, best_epoch, best_state = float("inf"), 0, copy.deepcopy(head.state_dict())
        for epoch in range(1, options.epochs + 1):
            head.train()
            for batch in torch.from_numpy(train)[torch.randperm(len(train))].split(options.batch_size):  # type: ignore[no-untyped-call]
                bag, present = pad([instances[k] for k in batch])
                loss = _loss(head(bag, present)[0], targets[batch], options)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            validation_loss = _validation_loss(head, instances, targets, validation, options)
            on_epoch(epoch)
            if validation_loss < best_loss:
                best_loss, best_epoch, best_state = validation_loss, epoch, copy.deepcopy(head.state_dict())
            elif epoch - best_epoch >= options.patience:
                break
    head.load_state_dict(best_state)
    counts = {"train_bags": len(train), "validation_bags": len(validation)}
    return head.eval(), {**counts, "best_epoch": best_epoch, "validation_loss": round(best_loss, 5)}


def pad(bags: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags of (N_b, D) -> (B, max N, D) float32 with zeros behind, and which instances are real (B, max N)."""
    longest = max(len(bag) for bag in bags)
    padded = torch.zeros(len(bags), longest, bags[0].shape[1])
    present = torch.zeros(len(bags), longest, dtype=torch.bool)
    for row, bag in enumerate(bags):
        padded[row, : len(bag)] = bag
        present[row, : len(bag)] = True
    return padded, present


def _loss(logits: Tensor, targets: Tensor, options: HeadOptions) -> Tensor:
    if options.task == "one_of_n":
        return nn.functional.cross_entropy(logits, targets.argmax(dim=1))
    return nn.functional.binary_cross_entropy_with_logits(logits, targets)


@torch.inference_mode()
def _validation_loss(
    head: ABMIL, instances: list[Tensor], targets: Tensor, rows: NDArray[np.int64], options: HeadOptions
) -> float:
    logits = _logits(head, [instances[k] for k in rows])
    return float(_loss(logits, targets[torch.from_numpy(rows)], options))


@torch.inference_mode()
def _probabilities(head: ABMIL, bags: list[Tensor], options: HeadOptions) -> NDArray[np.float64]:
    logits = _logits(head, bags)
    answer = logits.softmax(dim=1) if options.task == "one_of_n" else logits.sigmoid()
    return answer.double().numpy()


def _logits(head: ABMIL, bags: list[Tensor]) -> Tensor:
    head.eval()
    return torch.cat([head(*pad([bag]))[0] for bag in bags])  # one by one: no padding to pay for
