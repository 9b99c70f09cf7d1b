"""What a run says of itself while it goes: figures in CSV and TensorBoard, and progress for who watches."""

import csv
import logging
import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboardX import SummaryWriter

from models.lecl.clock import Reading
from models.lecl.config import Config
from models.lecl.watch import Spread

log = logging.getLogger("keyslice.pretrain")


class Journal:
    """Kept by the first process: losses and embeddings are of its part of each batch, rates of all processes."""

    def __init__(self, config: Config, step: int, steps: int) -> None:
        columns = ["learning_rate", "loss", *config.objectives.weights, "feature_std", "effective_rank"]
        self._metrics = _Metrics(config.run.output, [*columns, "images_per_s", "data_wait_share"], step)
        self._bar = _Bar(step, steps)
        self._steps, self._batch = steps, config.run.batch
        self._before, self._alarm = Reading(), False
        self.losses: dict[str, float] = {}

    def add(self, step: int, rate: float, losses: dict[str, float], spread: Spread | None, reading: Reading) -> None:
        """One row. `reading` is of the whole run; the row says how it went since the row before."""
        here, self._before = reading.since(self._before), reading
        figures = {
            "learning_rate": rate,
            **losses,
            "feature_std": spread.feature_std if spread else None,
            "effective_rank": spread.effective_rank if spread else None,
            "images_per_s": round(here.images_per_s, 1),
            "data_wait_share": round(here.wait_share, 4),
        }
        self._metrics.add(step, figures)
        self.losses = losses
        left = (self._steps - step) * self._batch / here.images_per_s if here.images_per_s else 0.0
        self._bar.say(
            step,
            f"loss {losses['loss']:.4f}, {here.images_per_s:.1f} images/s, {timedelta(seconds=round(left))} left",
        )
        alarm = spread.alarm() if spread else None
        if alarm and not self._alarm:  # said once, not in every row until it is over
            log.warning("step %d: %s", step, alarm)
        self._alarm = alarm is not None

    def step(self, step: int) -> None:
        self._bar.step(step)

    def sync(self) -> None:
        """Bring the rows to the disk: those until a checkpoint must survive what the checkpoint survives."""
        self._metrics.sync()

    def close(self) -> None:
        self._metrics.close()
        self._bar.close()


class _Metrics:
    """`metrics.csv`, one row per logged step, and the same for TensorBoard.

    Rows after `step`, which a run wrote and then lost with its state, are dropped when it resumes from there.
    """

    def __init__(self, folder: Path, columns: Sequence[str], step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path, columns = folder / "metrics.csv", ["step", *columns]
        temporary = path.with_suffix(".writing")
        kept = _rows_until(path, step)
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        temporary.replace(path)
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, step: int, figures: Mapping[str, float | None]) -> None:
        """One row; a figure that is None stays empty."""
        self._writer.writerow({"step": step, **figures})
        self._file.flush()
        for name, value in figures.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._board.close()


class _Bar:
    """A bar on a terminal, a line per row elsewhere."""

    def __init__(self, step: int, steps: int) -> None:
        self._steps = steps
        columns = TextColumn("{task.completed}/{task.total}"), BarColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=steps, completed=step)
        if self._bar.console.is_terminal:
            self._bar.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def say(self, step: int, line: str) -> None:
        self._bar.update(self._task, completed=step, description=line)
        if not self._bar.console.is_terminal:
            log.info("step %d of %d: %s", step, self._steps, line)

    def close(self) -> None:
        if self._bar.console.is_terminal:
            self._bar.stop()


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        # The last row of a run that was killed may be cut short: its missing cells are None.
        return [row for row in csv.DictReader(file) if None not in row.values() and int(row["step"]) <= step]
