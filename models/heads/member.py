"""One network trained on one fold: fresh seeded weights, early stopping on the fold's own validation bags."""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor, nn

from models.abmil import ABMIL, GatedABMIL, MaxPooling, MeanPooling
from models.heads.loader import Bags
from models.heads.options import HeadOptions, Network

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]

REPORT = "report"  # the tensor that is no weight: the report's JSON, byte by byte


class Member:
    """A trained network of an ensemble, over the bags that it was trained on and others beside them."""

    def __init__(self, network: nn.Module, bags: Bags, report: dict[str, Any]) -> None:
        self.network = network.eval()
        self.report = report
        self._bags = bags

    @classmethod
    def loaded(cls, saved: bytes, bags: Bags, labels: int, options: HeadOptions) -> "Member":
        """What saved() wrote of a network of these options."""
        state = load(saved)
        report = json.loads(state.pop(REPORT).numpy().tobytes())
        with torch.random.fork_rng(devices=[]):
            network = new_network(options.network, bags.dim, labels, options)
        network.load_state_dict(state, strict=True)
        return cls(network, bags, report)

    def saved(self) -> bytes:
        """The network and its report as safetensors."""
        report = torch.frombuffer(bytearray(json.dumps(self.report).encode()), dtype=torch.uint8)
        return save({**self.network.state_dict(), REPORT: report})

    @torch.inference_mode()
    def predict(self, rows: Rows) -> tuple[Floats, Floats]:
        """Logits (rows, labels), and the share of attention on each window (rows, windows)."""
        place = {int(row): k for k, row in enumerate(rows)}
        logits: list[Any] = [None] * len(rows)
        shares: list[Any] = [None] * len(rows)
        for part, padded, present in self._bags.read(self._bags.chunks(rows)):
            answer, attention = self.network(padded, present)
            for k, row in enumerate(part):
                logits[place[int(row)]] = answer[k].double().numpy()
                by_window = attention[k, : self._bags.instances(row)].reshape(-1, self._bags.windows)
                shares[place[int(row)]] = by_window.sum(dim=0).double().numpy()
        return np.array(logits), np.array(shares)


def new_network(name: Network, dim: int, labels: int, options: HeadOptions) -> nn.Module:
    """A network with the random weights of torch's present seed."""
    if name in ("mean", "max"):
        return (MeanPooling if name == "mean" else MaxPooling)(dim, labels, options.hidden, options.dropout)
    kind = ABMIL if name == "abmil" else GatedABMIL
    return kind(dim, labels, options.hidden, options.dropout, options.attention)


def train_member(
    bags: Bags,
    targets: Tensor,
    train: Rows,
    validation: Rows,
    options: HeadOptions,
    seed: int,
    on_epoch: Callable[[int], None],
) -> Member:
    """Train `options.network` on the rows `train` of targets (rows, labels), NaN being unknown.

    Keeps the weights of the epoch with the lowest validation loss. Torch's random numbers stay as they were for others.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = new_network(options.network, bags.dim, targets.shape[1], options)
        optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        best_loss, best_epoch, best_state = float("inf"), 0, copy.deepcopy(network.state_dict())
        for epoch in range(1, options.epochs + 1):
            network.train()
            for batch in torch.from_numpy(train)[torch.randperm(len(train))].split(options.batch_size):  # type: ignore[no-untyped-call]
                _step(network, optimizer, bags, targets, batch.numpy(), options)
            loss = _mean_loss(network, bags, targets, validation, options)
            on_epoch(epoch)
            if loss < best_loss or math.isnan(loss):  # NaN: no label of a validation bag is known
                best_loss, best_epoch, best_state = loss, epoch, copy.deepcopy(network.state_dict())
            elif epoch - best_epoch >= options.patience:
                break
    network.load_state_dict(best_state)
    report = {
        "train_bags": len(train),
        "validation_bags": len(validation),
        "best_epoch": best_epoch,
        "epochs": epoch,
        "validation_loss": None if math.isnan(best_loss) else round(best_loss, 5),
        "seed": seed,
    }
    return Member(network, bags, report)


def _step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    bags: Bags,
    targets: Tensor,
    batch: Rows,
    options: HeadOptions,
) -> None:
    """One update by the mean loss of the batch, whose gradient is summed chunk by chunk."""
    known = _known(targets[torch.from_numpy(batch)], options)
    if not known:
        return
    optimizer.zero_grad()
    for rows, padded, present in bags.read(bags.chunks(batch)):
        loss = _summed_loss(network(padded, present)[0], targets[torch.from_numpy(rows)], options) / known
        loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


@torch.inference_mode()
def _mean_loss(network: nn.Module, bags: Bags, targets: Tensor, rows: Rows, options: HeadOptions) -> float:
    """NaN where nothing is known of these rows."""
    network.eval()
    total = 0.0
    for part, padded, present in bags.read(bags.chunks(rows)):
        total += float(_summed_loss(network(padded, present)[0], targets[torch.from_numpy(part)], options))
    known = _known(targets[torch.from_numpy(rows)], options)
    return total / known if known else float("nan")


def _known(targets: Tensor, options: HeadOptions) -> int:
    """How many terms the summed loss has."""
    return len(targets) if options.one_of_n else int((~targets.isnan()).sum())


def _summed_loss(logits: Tensor, targets: Tensor, options: HeadOptions) -> Tensor:
    if options.one_of_n:
        return nn.functional.cross_entropy(logits, targets.argmax(dim=1), reduction="sum")
    known = ~targets.isnan()
    return nn.functional.binary_cross_entropy_with_logits(logits[known], targets[known], reduction="sum")
