"""What a head costs whose bags stream from Zarr, against a plain torch loop that has them all in memory.

Both train the same networks on the same folds of the same synthetic bags, in turns, each time in a fresh process.
Prints a table, and as its last line JSON.

    python bench/heads.py [--bags 1000] [--slices 300] [--epochs 2] [--rounds 3]
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.memory import peak_mb
from models.abmil import ABMIL
from models.heads import loader
from models.heads.options import HeadOptions
from models.heads.protocols import plan
from models.heads.train import LabelledBag, train_head
from service.storage.bags import Bags
from service.storage.folder import Folder
from service.storage.keys import EmbeddingKey

WINDOWS, DIM = 2, 576
LESION_SLICES = 0.02  # of a positive bag's
LESION = 0.5  # how far every value of a lesion's slices is moved, in standard deviations
MOST_OVER_PLAIN, MOST_MB = 1.3, 2 * 1024

console = Console(width=100)


@dataclass
class Trained:
    """What one training took, and what came of it."""

    seconds: float
    peak_mb: float  # of its process
    updates: int  # of weights, over all folds
    losses: list[float]  # of each fold on what it held out, lowest over the epochs
    auroc: float  # on what each fold held out, mean over the folds


Loop = Callable[..., Trained]  # (store of bags, how many, options)


def main(
    bags: Annotated[int, typer.Option(help="One of each patient; half of them positive.")] = 1000,
    slices: Annotated[int, typer.Option(help="Of each bag.")] = 300,
    epochs: Annotated[int, typer.Option(help="Of every fold; none stops early.")] = 2,
    rounds: Annotated[int, typer.Option(help="Trainings of either kind, in turns.")] = 3,
) -> None:
    """Train both ways and print how they compare."""
    options = HeadOptions(epochs=epochs, patience=epochs)
    loops: dict[str, Loop] = {"streamed": streamed, "plain": plain}
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name:
        write_bags(Path(name), bags, slices)
        found: dict[str, list[Trained]] = {name: [] for name in loops}
        for _ in track(range(rounds), "rounds", console=console):
            for each, loop in loops.items():  # they take turns, so that both see the same machine
                found[each].append(in_fresh_process(loop, Path(name), bags, options))
    report(found, f"{bags} bags of ({slices}, {WINDOWS}, {DIM}), {options.folds} folds, {epochs} epochs")


def write_bags(root: Path, bags: int, slices: int) -> None:
    """Bags of noise; in those of odd number neighbouring slices are moved along all axes a little."""
    store = Bags(Folder(root))
    lesion = max(1, round(slices * LESION_SLICES))
    for number in track(range(bags), "writing bags", console=console):
        random = np.random.default_rng(number)
        bag = random.standard_normal((slices, WINDOWS, DIM), np.float32)
        if positive(number):
            first = random.integers(slices - lesion + 1)
            bag[first : first + lesion] += LESION
        store.put(*name_of(number), bag.astype(np.float16), {})


def positive(number: int) -> bool:
    return number % 2 == 1


def name_of(number: int) -> tuple[EmbeddingKey, str]:
    """The key and content of a bag in the store."""
    return EmbeddingKey(f"1.2.{number}", "synthetic@0"), "c0"


def in_fresh_process(loop: Loop, *arguments: Any) -> Trained:
    """So that neither warms the other's memory, and each has a peak of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(loop, *arguments).result()


def streamed(root: Path, bags: int, options: HeadOptions, keep_bytes: int = loader.KEEP_BYTES) -> Trained:
    """As a worker trains a head; `keep_bytes` of bags stay in memory."""
    loader.KEEP_BYTES = keep_bytes
    store = Bags(Folder(root))
    labelled = [
        LabelledBag(str(number), (float(positive(number)),), partial(store.get, *name_of(number)))
        for number in range(bags)
    ]
    with counted_updates() as updates:
        begun = time.perf_counter()
        made = train_head(labelled, ["lesion"], options, lambda done, known: None).report
        seconds = time.perf_counter() - begun
    losses = [fold["validation_loss"] for fold in made["folds"]]
    auroc = made["validation"]["lesion"]["auroc"]["over_folds"]["mean"]
    return Trained(seconds, peak_mb(), len(updates), losses, auroc)


def plain(root: Path, bags: int, options: HeadOptions) -> Trained:
    """As anyone would write it: all bags in memory before the clock starts, each batch whole."""
    store = Bags(Folder(root))
    ready = [torch.from_numpy(store.get(*name_of(number))).flatten(0, 1).float() for number in range(bags)]
    truth = torch.tensor([[float(positive(number))] for number in range(bags)])  # (bags, 1)
    folds = list(plan(truth.numpy(), np.arange(bags), options).deployed.each())
    with counted_updates() as updates:
        begun = time.perf_counter()
        results = [
            plain_loop(ready, truth, train, validation, options, options.seed + fold)
            for fold, (train, validation) in enumerate(folds)
        ]
        seconds = time.perf_counter() - begun
    losses, aurocs = zip(*results, strict=True)
    return Trained(seconds, peak_mb(), len(updates), list(losses), statistics.mean(aurocs))


def plain_loop(
    bags: Sequence[Tensor],
    truth: Tensor,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    options: HeadOptions,
    seed: int,
) -> tuple[float, float]:
    """The lowest validation loss of a new network trained on bags (N, D) of truth (bags, 1), and its AUROC there."""
    torch.manual_seed(seed)
    network = ABMIL(bags[0].shape[1], 1, options.hidden, options.dropout, options.attention)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    train_rows, held_out = torch.from_numpy(train), torch.from_numpy(validation)
    best_loss, best_logits = float("inf"), torch.empty(0)
    for _ in range(options.epochs):
        network.train()
        for rows in train_rows[torch.randperm(len(train))].split(options.batch_size):
            optimizer.zero_grad()
            logits, _ = network(*padded([bags[row] for row in rows]))
            nn.functional.binary_cross_entropy_with_logits(logits, truth[rows]).backward()
            optimizer.step()
        network.eval()
        with torch.inference_mode():
            batches = held_out.split(options.batch_size)
            logits = torch.cat([network(*padded([bags[row] for row in rows]))[0] for rows in batches])
        loss = float(nn.functional.binary_cross_entropy_with_logits(logits, truth[held_out]))
        if loss < best_loss:
            best_loss, best_logits = loss, logits
    return best_loss, float(roc_auc_score(truth[held_out, 0], best_logits[:, 0]))


def padded(bags: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Bags (N_b, D) -> (B, max N, D), and which instances are real (B, max N)."""
    lengths = torch.tensor([len(bag) for bag in bags])
    return pad_sequence(bags, batch_first=True), torch.arange(int(lengths.max())) < lengths[:, None]


@contextmanager
def counted_updates() -> Iterator[list[None]]:
    """A list that grows by one with every step of any optimizer."""
    steps: list[None] = []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(None))
    yield steps
    hook.remove()


def report(found: dict[str, list[Trained]], what: str) -> None:
    seconds = {name: statistics.median(each.seconds for each in runs) for name, runs in found.items()}
    peaks = {name: max(each.peak_mb for each in runs) for name, runs in found.items()}
    table = Table("", "seconds", "peak MB", "updates", "validation loss", "AUROC", title=what)
    for name, runs in found.items():
        last = runs[-1]
        figures = f"{seconds[name]:.1f}", f"{peaks[name]:.0f}", f"{last.updates}"
        table.add_row(name, *figures, f"{statistics.mean(last.losses):.4f}", f"{last.auroc:.3f}")
    console.print(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads; medians of {len(found['plain'])} rounds")
    console.print(table)
    ratio = seconds["streamed"] / seconds["plain"]
    console.print(
        f"{ratio:.2f} times the plain loop's seconds, {'' if ratio <= MOST_OVER_PLAIN else 'NOT '}at most "
        f"{MOST_OVER_PLAIN}; {peaks['streamed']:.0f} MB, {'' if peaks['streamed'] < MOST_MB else 'NOT '}below {MOST_MB}"
    )
    figures = {"over_plain_loop": round(ratio, 3)}
    for prefix, name in (("", "streamed"), ("plain_", "plain")):
        figures |= {f"{prefix}seconds": round(seconds[name], 1), f"{prefix}peak_mb": round(peaks[name])}
    print(json.dumps(figures))


if __name__ == "__main__":
    typer.run(main)
