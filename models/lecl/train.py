"""The pretraining run: from a configuration to a trained backbone, in as many pieces as it takes."""

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from models.lecl.archive import Archive
from models.lecl.checkpoint import CannotSave, WrongCheckpoint, discard, latest, save
from models.lecl.clock import Clock
from models.lecl.config import BadConfig, Config, DataConfig, DeepLesionConfig
from models.lecl.deeplesion import DeepLesion
from models.lecl.delivery import base_encoder, deliver
from models.lecl.export import CannotExport, check_name
from models.lecl.journal import Journal
from models.lecl.objectives import pretraining
from models.lecl.order import Order, Parts
from models.lecl.ranks import Rank, joined
from models.lecl.sources import BadSource, Concat, Source, Subset, balanced, leave_out, split
from models.lecl.stop import Stop, leave_to_parent
from models.lecl.training import Diverged, Training
from models.lecl.views import Views, collate
from models.memory import keep_freed_memory
from models.specs import EncoderSpec, MissingWeights, WrongWeights, encoder_id

log = logging.getLogger("keyslice.pretrain")

ERRORS = (
    BadConfig,
    BadSource,
    MissingWeights,
    WrongWeights,
    WrongCheckpoint,
    CannotSave,
    Diverged,
    CannotExport,
    OSError,  # a folder that cannot be made, a disk that fills under the metrics
)
AHEAD = 4  # batches that each worker keeps ready


@dataclass(frozen=True)
class Result:
    """What a run has come to."""

    steps: int  # done, by this run and those it resumed
    finished: bool
    images_per_s: float  # of this run, over all processes
    data_wait_share: float  # of this run's time: how long the network stood still for want of data
    losses: dict[str, float]  # as last logged; `loss` is their weighted sum
    checkpoint: Path
    encoder: EncoderSpec | None = None  # as exported


def pretrain(
    config: Config,
    weights_dir: Path,
    *,
    fresh: bool = False,
    max_seconds: float | None = None,
    export: str | None = None,
    command: str = "",
) -> Result:
    """Train as configured, from the output folder's last checkpoint unless `fresh` discards what is there.

    One process, or one of several that torchrun started. SIGINT, SIGTERM and `max_seconds` end the run after the step
    it is in, with a checkpoint. The first process exports the encoder: when all steps are done, under the configured
    name if there is one; under `export` however far it came. `command` is what the model card will say was run.
    Raises one of ERRORS.
    """
    stop = Stop(max_seconds)
    keep_freed_memory()  # a twelfth of a step's time on the CPU
    if name := export or config.encoder.name:
        check_name(name)
    base_encoder(config, weights_dir)
    with joined() as rank:
        source = open_source(config.data)
        torch.manual_seed(config.run.seed)
        module = pretraining(config, weights_dir)
        views = Views(source, config.views, config.run.seed, module.contrasts, module.restores)
        if fresh and rank.first:
            discard(config.run.output)
            shutil.rmtree(config.run.output / "tensorboard", ignore_errors=True)
        rank.any(False)  # no process looks for checkpoints before the first has discarded them
        result = run(config, module, views, collate, rank, stop)
        if name and rank.first and (export or result.finished):
            spec = deliver(config, name, module.backbone.network, source, result.steps, command, weights_dir)
            log.info("exported %s", encoder_id(spec, weights_dir))
            return replace(result, encoder=spec)
        return result


def open_source(data: DataConfig) -> Source:
    """The configured slices, without those of patients and folds that are left out. Raises BadSource."""
    sources: list[Source] = [
        DeepLesion(each.path, each.split)
        if isinstance(each, DeepLesionConfig)
        else Archive(each.path, each.boxes, data.cache)
        for each in data.sources
    ]
    source = sources[0] if len(sources) == 1 else Concat(*sources)
    if data.leave_out_patients:
        source = leave_out(source, set(data.leave_out_patients))
    if data.folds is not None and data.fold is not None:
        left_out = set(split(source.patients, data.folds, data.split_seed)[data.fold])
        source = Subset(source, [index for index in range(len(source)) if index not in left_out])
    return balanced(source) if data.balanced else source


def run(
    config: Config,
    module: nn.Module,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], Any],
    rank: Rank,
    stop: Stop,
) -> Result:
    """Train `module` on `dataset` until its last step or until `stop`, from the last checkpoint if there is one.

    `module` answers a batch with losses by name, unweighted; it has `backbone`, which answers (map, embedding), and
    `after_step(progress)`. `dataset` has a length and answers the keys of models/lecl/order.py; `collate` makes a
    batch with `to(device)`, and with `pin_memory()` where there is a GPU.
    """
    folder, clock = config.run.output, Clock(rank.device)
    torch.manual_seed(config.run.seed + rank.number)
    training = Training(config, module, len(dataset), rank)  # type: ignore[arg-type]
    if path := latest(folder):
        training.restore(path)
        if rank.first:
            log.info("resuming from %s, of %d steps", path.name, training.steps)
    batches = _batches(config, training, dataset, collate, rank)
    journal = Journal(config, training.done, training.steps) if rank.first else None
    ended = False
    with stop.listening(), training.watching():
        while training.done < training.steps and not ended:
            rate = training.learning_rate
            training.step(batches, clock)
            ended = rank.any(stop.reason() is not None)
            done = training.done == training.steps
            if journal:
                journal.step(training.done)
            # No row for a mere interruption: the figures are those of a run that never was.
            if training.done % config.run.log_every == 0 or done:
                losses, reading = training.means(), clock.read()
                if journal:
                    journal.add(training.done, rate, losses, training.watch.spread(), reading)
            if training.done % config.run.checkpoint_every == 0 or done or ended:
                path = _saved(folder, training, journal)
    return _result(training, journal, clock, path or folder, stop)


def _batches(
    config: Config, training: Training, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], rank: Rank
) -> Iterator[Any]:
    """This process's parts of all steps that are left, prepared ahead."""
    run = config.run
    order = Order(len(dataset), run.batch, run.seed)  # type: ignore[arg-type]
    # There are as many workers as there shall be threads. Said here and not in the workers: there OpenCV would wait for
    # ever for its threads to end, which a fork has left behind.
    cv2.setNumThreads(1)
    loader = DataLoader(
        dataset,
        batch_sampler=Parts(order, training.done, training.steps, run.accumulate, rank.number, rank.processes),
        collate_fn=collate,
        num_workers=run.workers,
        prefetch_factor=AHEAD if run.workers else None,
        pin_memory=rank.device.type == "cuda",
        worker_init_fn=_in_worker,
        generator=torch.Generator(),  # the loader draws a number; from the run's own it would tell how often it resumed
    )
    return iter(loader)


def _in_worker(_number: int) -> None:
    leave_to_parent()


def _saved(folder: Path, training: Training, journal: Journal | None) -> Path | None:
    state = training.state()
    if journal is None:
        return None
    journal.sync()
    return save(folder, training.done, state)


def _result(training: Training, journal: Journal | None, clock: Clock, path: Path, stop: Stop) -> Result:
    reading, finished = clock.read(), training.done == training.steps
    losses = journal.losses if journal else {}
    result = Result(training.done, finished, reading.images_per_s, reading.wait_share, losses, path)
    if journal:
        journal.close()
        log.info(
            "step %d of %d, %s; %.1f images/s, %.1f %% of the time without data to work on",
            training.done,
            training.steps,
            path.name,
            result.images_per_s,
            100 * result.data_wait_share,
        )
        if not finished:
            log.info("stopped (%s); start it again to go on", stop.reason() or "another process was")
    return result
