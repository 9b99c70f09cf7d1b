"""An encoder trained without some of the patients."""

import hashlib
from pathlib import Path

from filelock import FileLock

from bench.patients import NEVER_TRAINED_ON, keys
from models.exported import exported
from models.lecl.config import ArchiveConfig, Config, read_config
from models.lecl.train import pretrain
from models.specs import EncoderSpec


def train_fold(config: Path, held_out: frozenset[str], cache: Path) -> EncoderSpec:
    """The encoder that this configuration gives on every patient of the data but those held out.

    `held_out` names patients as bench/patients.py does: the folder of a volume, or `single-<number>`. Its weights are
    in `cache / "weights"`. Training is resumed where it was cut off, and not repeated where it is done; of two
    processes that ask for it, one trains. Raises KeyboardInterrupt where it is told to end: half an encoder is none.
    """
    known = keys(cache / "unpacked")
    left_out = sorted(key for name in held_out - NEVER_TRAINED_ON for key in known[name])
    digest = hashlib.sha256(config.read_bytes() + "".join(left_out).encode()).hexdigest()
    name, weights = f"{config.stem}_{digest[:12]}", cache / "weights"
    runs = cache / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    with FileLock(runs / f"{name}.lock"):
        if name not in exported(weights):
            result = pretrain(_without(read_config(config), left_out, name, cache), weights)
            if not result.finished:
                raise KeyboardInterrupt
    return exported(weights)[name]


def _without(config: Config, left_out: list[str], name: str, cache: Path) -> Config:
    """The run on what the cache holds of the data, without these patients."""
    data = {
        "sources": [ArchiveConfig(kind="archive", path=cache / "unpacked")],
        "cache": cache / "hu",
        "leave_out_patients": left_out,
    }
    encoder = config.encoder.model_copy(update={"name": name})
    told = config.model_copy(update={"data": config.data.model_copy(update=data), "encoder": encoder})
    return told.writing_to(cache / "runs" / name)
