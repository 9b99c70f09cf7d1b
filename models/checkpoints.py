"""Weights files: tensors by name, and nothing in the file is executed."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint

from models.specs import WrongWeights

# What training scripts wrap their weights in. The first one present wins: the weights as trained before
# their moving average, as the scripts themselves evaluate unless told otherwise.
WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema")

PICKLED_CODE = (
    "beside tensors it holds pickled code ({wanted}), which was not run. Where you trust its author, keep the tensors "
    "alone: torch.save(torch.load('the file', weights_only=False)['state_dict'], 'weights.pth')"
)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that torch.save wrote (.pth, .pt, .pth.tar, .bin).

    float16 and bfloat16 come as float32, which holds their every value. Raises WrongWeights.
    """
    state = _read(path)
    if isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WrongWeights(f"{path.name} does not hold a dictionary of tensors by name")
    halves = (torch.float16, torch.bfloat16)
    return {name: value.float() if value.dtype in halves else value for name, value in state.items()}


def without_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The state with the prefix taken off, if every name has it; else the state as it is."""
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): value for name, value in state.items()}


def moco_encoder(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The base encoder of a MoCo-v3 checkpoint (arXiv:2104.02057) under its own names; another state as it is.

    `module.`, which DistributedDataParallel puts before every name, goes in either case. The momentum
    encoder and the predictor serve the training only and are dropped. The encoder's head, which MoCo
    replaces by a projector, is left to the encoder's family.
    """
    state = without_prefix(state, "module.")
    encoder = {name: value for name, value in state.items() if name.startswith("base_encoder.")}
    if not encoder:
        return state
    foreign = [name for name in state if not name.startswith(("base_encoder.", "momentum_encoder.", "predictor."))]
    if foreign:
        raise WrongWeights(f"beside its encoders and predictor, the MoCo checkpoint holds {', '.join(foreign)}")
    return without_prefix(encoder, "base_encoder.")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle each raise their own
        wanted = _pickled_code(path, error)
        raise WrongWeights(
            f"{path.name} is not a readable weights file: "
            + (PICKLED_CODE.format(wanted=", ".join(wanted)) if wanted else type(error).__name__)
        ) from error


def _pickled_code(path: Path, error: Exception) -> list[str]:
    """The classes and functions that the file asked for beside tensors; only the first in a file without a zip."""
    try:
        return sorted(get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # no zip, or a pickle that the listing cannot follow: torch's error names where it stopped
        return re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
