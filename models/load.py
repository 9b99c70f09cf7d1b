"""Spec to network: in eval mode, loaded strictly, weights only."""

import importlib
import logging
import math
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.checkpoints import read_checkpoint
from models.ct.slices import encoder_input
from models.memory import keep_freed_memory
from models.runtimes import Run, start
from models.specs import EncoderSpec, WrongWeights, locate_weights, weights_sha256

BATCH_INSTANCES = 16  # 8 to 16 is fastest on a CPU (docs/performance.md)
CUDA_BATCH_INSTANCES = 256

log = logging.getLogger(__name__)


class Embedding(nn.Module):
    """The network behind its normalisation: instances in [0, 1] in, embeddings out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...], axes: int) -> None:
        super().__init__()
        self.network = network
        shape = (1, len(mean), *(1,) * axes)  # axes: 2 of a slice, 3 of a volume
        self.register_buffer("mean", torch.tensor(mean).view(shape), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(shape), persistent=False)

    def forward(self, instances: Tensor) -> Tensor:
        """(B, 1, H, W) or (B, 1, D, H, W) in [0, 1] -> (B, dim)."""
        images = (instances - self.mean) / self.std  # the one channel becomes as many as the network has
        images = images.contiguous(memory_format=torch.channels_last if images.ndim == 4 else torch.channels_last_3d)
        embeddings: Tensor = self.network(images)
        return embeddings


class Encoder:
    """A frozen network with its preprocessing: slices (or a volume) in, embeddings out.

    The network always runs on one shape, `batch` slices, filled up where there are fewer. So an embedding
    does not depend on how many share its batch, and whatever is compiled is compiled for that shape.
    """

    def __init__(self, spec: EncoderSpec, network: nn.Module, weights_sha256: str, compiled: Path) -> None:
        self.spec = spec
        self.fingerprint = spec.fingerprint(weights_sha256)
        self.id = f"{spec.name}@{self.fingerprint[:12]}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.batch = _batch(spec, self.device)  # slices
        flat = spec.kind == "slice2d"
        network = network.to(memory_format=torch.channels_last if flat else torch.channels_last_3d)  # type: ignore[call-overload]
        self.network = Embedding(network, spec.mean, spec.std, axes=2 if flat else 3).eval().to(self.device)
        self._compiled = compiled / f"{spec.name}-{self.fingerprint[:12]}-{version('keyslice')}"
        self._at_once = self.batch  # less after the device has run out of memory
        self._run = self._start()

    def encode(self, slices: NDArray[np.float32]) -> NDArray[np.float32]:
        """(slices, *spec.input_shape) in [0, 1] -> (slices, windows, dim); any number of slices."""
        parts = []
        for first in range(0, len(slices), self.batch):
            part = slices[first : first + self.batch]
            whole = np.zeros((self.batch, *self.spec.input_shape), np.float32)
            whole[: len(part)] = part
            parts.append(self.begin(whole)()[: len(part)])
        return np.concatenate(parts)

    def begin(self, batch: NDArray[np.float32]) -> Callable[[], NDArray[np.float32]]:
        """Start on (batch, *spec.input_shape) in [0, 1]; calling what comes back waits for (batch, windows, dim).

        On CUDA copies and network run while the caller prepares the next batch; on the CPU all is done
        at once. The caller may overwrite the batch as soon as this returns.
        """
        instances = torch.from_numpy(batch).view(-1, 1, *self.spec.input_shape[1:])
        with torch.inference_mode():
            if self.device.type == "cuda":
                embeddings, arrived = self._on_cuda(instances)
            else:
                embeddings, arrived = self._forward(instances), None

        def wait() -> NDArray[np.float32]:
            if arrived is not None:
                arrived.synchronize()
            answer: NDArray[np.float32] = embeddings.numpy().reshape(len(batch), -1, self.spec.dim)
            return answer

        return wait

    def _on_cuda(self, instances: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Embeddings on the host, and after which event. Only pinned memory is copied while others work."""
        found = self._forward(instances.pin_memory().to(self.device, non_blocking=True))
        embeddings = torch.empty(found.shape, pin_memory=True)
        embeddings.copy_(found, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()
        return embeddings, arrived

    def _forward(self, instances: Tensor) -> Tensor:
        """(batch * windows, 1, ...) -> (batch * windows, dim), in smaller parts once memory has run out."""
        windows = self.spec.input_shape[0]
        try:
            return torch.cat([self._run(part) for part in torch.split(instances, self._at_once * windows)])
        except torch.OutOfMemoryError:
            if self._at_once == 1:
                raise
        self._at_once //= 2
        log.warning("%s: out of device memory, going on with %d slices at once", self.id, self._at_once)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._run = self._start()
        return self._forward(instances)

    def _start(self) -> Run:
        windows, *picture = self.spec.input_shape
        example = torch.rand(self._at_once * windows, 1, *picture, device=self.device)
        shape = "x".join(map(str, example.shape))
        keep_as = self._compiled.with_name(f"{self._compiled.name}-{shape}")
        return start(self.spec.runtime, self.spec.precision, self.network, example, keep_as)


def load_encoder(spec: EncoderSpec, weights_dir: Path) -> Encoder:
    """The encoder, ready to run. Raises MissingWeights, WrongWeights naming what differs, or CannotRun."""
    keep_freed_memory()
    digest = weights_sha256(spec, weights_dir)
    return Encoder(spec, load_network(spec, weights_dir), digest, weights_dir / "compiled")


def load_network(spec: EncoderSpec, weights_dir: Path) -> nn.Module:
    """The bare network with its weights, in eval mode, without gradients."""
    family = importlib.import_module(f"models.encoders.{spec.family}")
    network: nn.Module = family.build(spec.network)
    state = read_checkpoint(locate_weights(spec, weights_dir))
    # What was saved from this very network, as exports are and as a package's file may be, has our names already.
    if spec.weights.source != "export" and _shapes(state) != _shapes(network.state_dict()):
        state = family.adapt(state, network)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise WrongWeights(f"{spec.name}: {error}") from error
    return network.eval().requires_grad_(False)


def device_found() -> str:
    """What networks run on here, for people."""
    if not torch.cuda.is_available():
        return f"no GPU; {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, {free // 2**20} of {total // 2**20} MiB free"


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def canary(spec: EncoderSpec) -> NDArray[np.float32]:
    """A fixed input, (1, *spec.input_shape) in [0, 1]: ramps of HU, or of brightness through a volume."""
    if spec.volume:
        ramp = np.linspace(0, 1, math.prod(spec.input_shape), dtype=np.float32)
        return ramp.reshape(1, *spec.input_shape)
    ramp = np.linspace(-1024, 1024, 512 * 512, dtype=np.float32).reshape(512, 512)  # HU
    return encoder_input(ramp + ramp.T, spec.windows, spec.input_size)[None]


def _batch(spec: EncoderSpec, device: torch.device) -> int:
    """Slices that go through the network at once: a power of two, so that halves of it fill it exactly."""
    if spec.kind == "volume3d":
        return 1
    instances = CUDA_BATCH_INSTANCES if device.type == "cuda" else BATCH_INSTANCES
    return 1 << max(0, (instances // len(spec.windows)).bit_length() - 1)
