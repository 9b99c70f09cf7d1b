"""Checkpoints of a pretraining run: the last two, each whole or not there."""

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.durable import fsync_path

KEPT = 2
PATTERN = "checkpoint-*.pt"
WRITING = ".writing"
# What may differ between a run and its resumption: it changes where and how often, not what is learned.
MAY_DIFFER = (
    "data.cache",
    "data.sources.path",
    "data.sources.boxes",
    "data.description",
    "data.attribution",
    "encoder.name",
    "encoder.licence",
    "encoder.commercial_use",
    "run.output",
    "run.workers",
    "run.checkpoint_every",
    "run.log_every",
)


class CannotSave(Exception):
    """The checkpoint could not be written; the ones before it are as they were."""


class WrongCheckpoint(Exception):
    """The checkpoint is not one of this run; the message says what was found and what was expected."""


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `checkpoint-<step>.pt` into the folder, and delete all but the last two. Raises CannotSave.

    `state` holds tensors, numbers, texts, lists and dictionaries. It is written under a temporary name, fsynced and
    renamed: a process that dies between any two lines leaves the checkpoints before it, and at most a temporary file.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    path = folder / f"checkpoint-{step:09d}.pt"
    temporary = folder / f".{path.name}{WRITING}"
    for abandoned in folder.glob(f".*{WRITING}"):  # by a process that was killed; it takes room
        abandoned.unlink()
    try:
        with temporary.open("wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_path(folder)  # without it the rename itself may be lost with the power
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotSave(_full(folder, buffer.getbuffer().nbytes, error)) from error
    for old in _checkpoints(folder)[:-KEPT]:
        old.unlink()
    return path


def latest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, if there is one."""
    return next(reversed(_checkpoints(folder)), None)


def load(path: Path) -> dict[str, Any]:
    """The state on the CPU. Nothing in the file is executed. Raises WrongCheckpoint where it cannot be read."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickle and torch each raise their own
        raise WrongCheckpoint(f"{path.name} is not a readable checkpoint ({type(error).__name__})") from error
    return state


def discard(folder: Path) -> None:
    """Delete the folder's checkpoints."""
    for path in _checkpoints(folder):
        path.unlink()


def check_same_run(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises WrongCheckpoint, which names every fact that differs, unless all but MAY_DIFFER are equal."""
    left, right = dict(_flat(found)), dict(_flat(expected))
    differ = [
        f"{key}: found {_shown(left, key)}, expected {_shown(right, key)}"
        for key in dict.fromkeys([*right, *left])
        if left.get(key) != right.get(key)
    ]
    if differ:
        raise WrongCheckpoint(f"{path.name} is of another run: {'; '.join(differ)}")


def check_fits(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises WrongCheckpoint unless names and shapes are those of the network."""
    shapes, wanted = ({name: tuple(each.shape) for name, each in state.items()} for state in (found, expected))
    for name in dict.fromkeys([*wanted, *shapes]):
        if shapes.get(name) != wanted.get(name):
            raise WrongCheckpoint(
                f"{path.name} is of another architecture: {name} found {shapes.get(name, 'missing')}, "
                f"expected {wanted.get(name, 'none')}"
            )


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(PATTERN))


def _full(folder: Path, needed: int, error: OSError) -> str:
    free, last = shutil.disk_usage(folder).free, latest(folder)
    kept = f"{last.name} is as it was" if last else "there is none before it"
    return f"checkpoint of {needed:,} bytes not written to {folder}: {error.strerror}; {free:,} are free; {kept}"


def _flat(facts: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves by dotted key, lists by position, without MAY_DIFFER."""
    if isinstance(facts, dict):
        for name, value in facts.items():
            yield from _flat(value, f"{key}.{name}" if key else name)
    elif isinstance(facts, list) and any(isinstance(each, dict) for each in facts):
        for place, each in enumerate(facts):
            yield from ((f"{name} ({place + 1})", value) for name, value in _flat(each, key))
    elif key not in MAY_DIFFER:
        yield key, facts


def _shown(facts: Mapping[str, Any], key: str) -> str:
    return json.dumps(facts[key]) if key in facts else "nothing"
