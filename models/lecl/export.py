"""A trained network as an encoder that the service knows: weights, spec and model card in one folder."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from models.calibrate import lowest_cosine
from models.durable import fsync_path
from models.exported import CARD_FILE, NAME, RESERVED, SPEC_FILE, WEIGHTS_FILE, BadSpec, read_spec, write_spec
from models.lecl.card import Trained, model_card
from models.load import Embedding, canary, load_network
from models.specs import EncoderSpec, Weights, WrongWeights
from models.zoo import ENCODERS

MAY_CHANGE = {"input_size", "windows", "dim", "mean", "std", "licence", "commercial_use"}
COSINE = 0.9999  # of the canary's embeddings by the stored and by the trained weights, at the least


class CannotExport(Exception):
    """The encoder cannot be stored under this name or with these changes; the message says what would do."""


def export_encoder(
    backbone_state: Mapping[str, Tensor],
    base: EncoderSpec,
    *,
    name: str,
    changes: Mapping[str, Any],
    trained: Trained,
    weights_dir: Path,
    half: bool = True,
) -> EncoderSpec:
    """Write `<weights_dir>/<name>/`, whole or not at all, and answer its spec; the same export again changes nothing.

    `backbone_state` has the names of the network that `base.family` builds for `base.network`. `changes` replace fields
    of `base`: input_size in pixels, windows, dim, mean, std, licence, commercial_use. `half` stores float16. Raises
    CannotExport for a name that is taken or malformed and for other changes, WrongWeights where the weights do not fit
    the network, do not give `dim` finite numbers, or lose more than COSINE by rounding; OSError on a full disk.
    """
    check_name(name)
    if foreign := sorted(changes.keys() - MAY_CHANGE):
        raise CannotExport(f"{name}: cannot change {', '.join(foreign)}, only {', '.join(sorted(MAY_CHANGE))}")
    content = save(_stored(backbone_state, half))
    weights = Weights("export", f"{name}/{WEIGHTS_FILE}", sha256=hashlib.sha256(content).hexdigest())
    weights_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=weights_dir, prefix=".") as partial:
        folder = Path(partial) / name
        folder.mkdir()
        _write(folder / WEIGHTS_FILE, content)
        _write(folder / SPEC_FILE, write_spec(replace(base, **changes, name=name, weights=weights)))
        spec = _read(folder)
        cosine = _checked(spec, Path(partial), backbone_state)
        _write(folder / CARD_FILE, model_card(spec, trained, cosine).encode())
        _publish(folder, weights_dir / name, spec)
    return spec


def check_name(name: str) -> None:
    """Raises CannotExport where no export can have this name: worth knowing before a training, not after."""
    if not NAME.fullmatch(name) or name in RESERVED:
        raise CannotExport(
            f"an encoder cannot be named {name!r}, expected {NAME.pattern}, and not {', '.join(RESERVED)}"
        )
    if name in ENCODERS:
        raise CannotExport(f"Keyslice ships an encoder named {name}, expected a new name")


def _stored(state: Mapping[str, Tensor], half: bool) -> dict[str, Tensor]:
    """The tensors as the file holds them. Raises WrongWeights for what is, or becomes by rounding, not finite."""
    stored = {}
    for name, tensor in state.items():
        value = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # safetensors shares no memory
        stored[name] = value.half() if half and value.is_floating_point() else value
        if not stored[name].isfinite().all():
            raise WrongWeights(f"{name} holds NaN, infinity, or numbers beyond {stored[name].dtype}")
    return stored


def _read(folder: Path) -> EncoderSpec:
    """The spec as whoever lists it will read it, so that its fingerprint is theirs."""
    try:
        return read_spec(folder / SPEC_FILE)
    except BadSpec as error:
        raise CannotExport(f"the spec cannot be read back: {error}") from error


def _checked(spec: EncoderSpec, weights_dir: Path, trained: Mapping[str, Tensor]) -> float:
    """The cosine of the canary's embeddings by the stored and the trained weights. Raises WrongWeights."""
    network = load_network(spec, weights_dir)
    stored = _canary_embeddings(network, spec)
    network.load_state_dict(trained, strict=True)
    cosine = lowest_cosine(stored, _canary_embeddings(network, spec))
    if cosine < COSINE:
        raise WrongWeights(
            f"{spec.name}: stored weights embed at cosine {cosine:.6f}, expected {COSINE}; not as float16?"
        )
    return cosine


def _canary_embeddings(network: nn.Module, spec: EncoderSpec) -> NDArray[np.float32]:
    """(windows, dim). Raises WrongWeights where the network cannot take the canary or answers another shape."""
    shape = spec.input_shape
    embedding = Embedding(network, spec.mean, spec.std, axes=len(shape) - 1)
    try:
        with torch.inference_mode():
            found: NDArray[np.float32] = embedding(torch.from_numpy(canary(spec)).view(-1, 1, *shape[1:])).numpy()
    except (RuntimeError, AssertionError, ValueError) as error:  # timm asserts a picture's size
        raise WrongWeights(f"{spec.name}: the network does not take {shape}: {error}") from error
    if found.shape != (shape[0], spec.dim):
        raise WrongWeights(f"{spec.name}: the network gives {found.shape}, expected {(shape[0], spec.dim)}")
    if not np.isfinite(found).all():
        raise WrongWeights(f"{spec.name}: the canary slice embeds to NaN or infinity")
    return found


def _publish(folder: Path, target: Path, spec: EncoderSpec) -> None:
    """Rename the folder into place, unless another is there already."""
    fsync_path(folder)
    try:
        folder.rename(target)  # refuses to replace a folder that holds anything
    except OSError:
        if not target.exists():
            raise
        if not (target / SPEC_FILE).is_file() or _read(target) != spec:
            raise CannotExport(
                f"{spec.name} is in the weights directory with other weights or settings, expected a new name"
            ) from None
    fsync_path(target.parent)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
