"""How fast pretraining is, and how long its network waits for data.

Trains on the real CT of ../shared/data (on synthetic chests where it is absent), with the configuration that the
shipped encoder was trained by. Prints a table, and as its last line JSON.

    python bench/pretrain.py [--minutes 10] [--config run.toml] [--workers 2]
"""

import json
import logging
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from models.ct.phantom import Identity, chest, write_series
from models.lecl.config import ArchiveConfig, Config, read_config
from models.lecl.objectives import Pretraining, pretraining
from models.lecl.sources import Source
from models.lecl.train import Result, open_source, pretrain
from models.lecl.views import Views, edited
from service.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CONFIG = ROOT / "models" / "lecl" / "configs" / "lesion_lite.toml"
STEPS = 40  # where no time is given
MANY = 10**6  # where one is given
SAMPLES = 64  # that a view's cost is measured on
MOST_WAITING = 0.05  # of the time

console = Console(width=100)


def main(
    minutes: Annotated[float | None, typer.Option(help=f"Train so long; {STEPS} steps if none is given.")] = None,
    config: Annotated[Path, typer.Option(help="What to train; its data and lengths are the bench's.")] = CONFIG,
    workers: Annotated[int | None, typer.Option(help="Processes that prepare views; the file's if none.")] = None,
) -> None:
    """Train for a while and print how it went."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name:
        seconds, weights = None if minutes is None else minutes * 60, Settings().weights_path
        told = configured(read_config(config), Path(name), STEPS if seconds is None else MANY, workers)
        costs = sample_costs(told, open_source(told.data), pretraining(told, weights))
        report(told, pretrain(told, weights, max_seconds=seconds), costs)


def configured(config: Config, folder: Path, steps: int, workers: int | None) -> Config:
    """So many steps of the run on unpacked data below `folder`."""
    data = {"sources": [ArchiveConfig(kind="archive", path=unpacked(folder / "ct"))], "cache": folder / "hu"}
    run: dict[str, Any] = {
        "steps": steps,
        "epochs": None,
        "warmup_epochs": None,
        "workers": config.run.workers if workers is None else workers,
        "checkpoint_every": MANY,
    }
    changes = {
        "data": config.data.model_copy(update=data),
        "encoder": config.encoder.model_copy(update={"name": None}),  # nothing is exported
        "run": config.run.model_copy(update=run),
    }
    return config.model_copy(update=changes).writing_to(folder / "run")


def unpacked(folder: Path) -> Path:
    """The folder, with every series of the data in it."""
    archives = sorted(DATA.glob("*/*.tar.xz"))
    for path in archives:
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(folder / path.parent.name, filter="data")
    if not archives:
        phantom = chest(seed=0, lesion=False, slices=64, size=512)
        write_series(folder, phantom.hu, phantom.spacing_mm, Identity("BENCH"))
    return folder


def sample_costs(config: Config, source: Source, module: Pretraining) -> dict[str, float]:
    """Milliseconds of one core that a sample takes: the planting in it, and all of it."""
    cv2.setNumThreads(1)
    views = Views(source, config.views, config.run.seed, module.contrasts, module.restores)
    indices = np.random.default_rng(0).permutation(len(source))[:SAMPLES].tolist()
    images = [source[index] for index in indices]

    def planted() -> None:
        for number, image in enumerate(images):
            edited(image, config.views, np.random.default_rng(number))

    def sampled() -> None:
        for index in indices:
            views[index, 0]

    planted()  # the first of anything is slower
    return {
        "planting and decoys": _core_ms(planted, len(indices)),
        "a sample, with those": _core_ms(sampled, len(indices)),
    }


def _core_ms(work: Callable[[], None], times: int) -> float:
    begun = time.thread_time()
    work()
    return 1000 * (time.thread_time() - begun) / times


def report(config: Config, result: Result, costs: dict[str, float]) -> None:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    views, run = config.views, config.run
    console.print(
        f"{config.encoder.base}, {views.crop or views.size} of {views.size} px, batch {run.batch}, "
        f"{run.workers} workers; {os.cpu_count()} cores; {device}"
    )
    table = Table("", "ms an image")
    for what, milliseconds in costs.items():
        table.add_row(f"{what}, on one core", f"{milliseconds:.1f}")
    busy = 1000 * (1 - result.data_wait_share) / result.images_per_s
    table.add_row("the network, forth and back", f"{busy:.1f}")
    console.print(table)
    share = result.data_wait_share
    verdict = "below" if share < MOST_WAITING else "NOT below"
    console.print(
        f"{result.steps} steps, {result.images_per_s:.1f} images/s; "
        f"{100 * share:.1f} % of the time waiting for data, {verdict} {100 * MOST_WAITING:.0f} %"
    )
    print(json.dumps({"images_per_s": round(result.images_per_s, 2), "data_wait_share": round(share, 4)}))


if __name__ == "__main__":
    typer.run(main)
