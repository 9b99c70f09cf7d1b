"""Spec to network: in eval mode, loaded strictly, weights only."""

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from models.memory import keep_freed_memory
from models.specs import EncoderSpec, WrongWeights, encoder_id, locate_weights, weights_sha256

BATCH_INSTANCES = 16  # 8 to 16 is fastest on a CPU (docs/performance.md)


class Encoder:
    """A frozen network with its preprocessing: slices in, embeddings out."""

    def __init__(self, spec: EncoderSpec, network: nn.Module, encoder_id: str, fingerprint: str) -> None:
        self.spec = spec
        self.id = encoder_id
        self.fingerprint = fingerprint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._mean = torch.tensor(spec.mean, device=self.device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=self.device).view(1, 3, 1, 1)

    def encode(self, slices: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
        """Slices (windows, size, size) in [0, 1] -> one (slices, windows, dim) array per batch, in order."""
        per_batch = max(1, BATCH_INSTANCES // len(self.spec.windows))
        batch: list[NDArray[np.float32]] = []
        for each in slices:
            batch.append(each)
            if len(batch) == per_batch:
                yield self.encode_batch(np.stack(batch))
                batch = []
        if batch:
            yield self.encode_batch(np.stack(batch))

    def encode_batch(self, slices: NDArray[np.float32]) -> NDArray[np.float32]:
        """(slices, windows, size, size) in [0, 1] -> (slices, windows, dim)."""
        count, windows, size, _ = slices.shape
        with torch.inference_mode():
            instances = torch.from_numpy(slices).to(self.device).view(count * windows, 1, size, size)
            embeddings: Tensor = self.network(self.normalise(instances))  # (slices * windows, dim)
            answer: NDArray[np.float32] = embeddings.float().cpu().numpy().reshape(count, windows, -1)
        return answer

    def normalise(self, instances: Tensor) -> Tensor:
        """(B, 1, size, size) in [0, 1] -> (B, 3, size, size), as the network was trained on."""
        images = (instances.expand(-1, 3, -1, -1) - self._mean) / self._std
        return images.contiguous(memory_format=torch.channels_last)


def load_encoder(spec: EncoderSpec, weights_dir: Path) -> Encoder:
    """The encoder, ready to run. Raises MissingWeights, or WrongWeights naming what differs."""
    keep_freed_memory()
    digest = weights_sha256(spec, weights_dir)
    family = importlib.import_module(f"models.encoders.{spec.family}")
    network: nn.Module = family.build(spec.network)
    state = family.adapt(_read_state(locate_weights(spec, weights_dir)), network)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WrongWeights(f"{spec.name}: {error}") from error
    return Encoder(spec, network.eval().requires_grad_(False), encoder_id(spec, weights_dir), spec.fingerprint(digest))


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name; nothing in the file is executed."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and pickle each raise their own
        raise WrongWeights(f"{path.name} is not a readable weights file: {type(error).__name__}") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise WrongWeights(f"{path.name} does not hold a dictionary of tensors by name")
    return state
