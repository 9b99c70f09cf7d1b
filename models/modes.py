"""How an encoder is run: the ways each mode allows, and the one that was measured best here."""

import json
import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from models.specs import EncoderSpec, Precision, Runtime, encoder_id

Mode = Literal["exact", "fast", "bulk"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """A runtime at a precision."""

    runtime: Runtime
    precision: Precision

    def __str__(self) -> str:
        return f"{self.runtime} {self.precision}"


EAGER = Way("torch-eager", "fp32")

# From simple to elaborate: a later way is chosen only where it is clearly faster.
EXACT = (EAGER, Way("torch-onednn", "fp32"), Way("onnxruntime", "fp32"), Way("inductor", "fp32"))
FAST = (*EXACT[:3], Way("torch-eager", "bf16"))  # ready in seconds: nothing is compiled
BULK = (*EXACT, Way("torch-eager", "bf16"), Way("inductor", "bf16"))
WAYS: dict[Mode, tuple[Way, ...]] = {"exact": EXACT, "fast": FAST, "bulk": BULK}

# A volume is one instance that takes seconds, so there is little to gain and much to compile.
VOLUME_WAYS: dict[Mode, tuple[Way, ...]] = {
    "exact": (EAGER,),
    "fast": (EAGER, Way("torch-eager", "bf16")),
    "bulk": (EAGER, Way("torch-eager", "bf16")),
}

# What was tried and is left out: fp32 compiling takes half a minute and loses to ONNX Runtime on these
# convolutions; exporting or compiling VMamba's scan takes many minutes (docs/performance.md).
LEFT_OUT: dict[str, tuple[Way, ...]] = {
    "efficientnet": (Way("inductor", "fp32"),),
    "vmamba": (Way("onnxruntime", "fp32"), Way("inductor", "fp32"), Way("inductor", "bf16")),
}

# The lowest cosine to eager fp32 that a mode accepts.
COSINE: dict[Mode, float] = {"exact": 0.999999, "fast": 0.9999, "bulk": 0.9995}


def ways(spec: EncoderSpec, mode: Mode) -> tuple[Way, ...]:
    """Those that the mode allows and that are worth measuring."""
    allowed = (WAYS if spec.kind == "slice2d" else VOLUME_WAYS)[mode]
    return tuple(way for way in allowed if way not in LEFT_OUT.get(spec.family, ()))


def run_as(spec: EncoderSpec, way: Way) -> EncoderSpec:
    """The spec at this runtime and precision, which is another encoder."""
    return replace(spec, runtime=way.runtime, precision=way.precision)


def in_mode(spec: EncoderSpec, mode: Mode, weights_dir: Path) -> EncoderSpec:
    """The spec as calibrate() found it best for the mode; plain eager fp32 where nothing was measured yet."""
    entry = measured(weights_dir).get(encoder_id(spec, weights_dir), {}).get(mode)
    return run_as(spec, Way(entry["runtime"], entry["precision"])) if entry else spec


def by_id(spec: EncoderSpec, wanted: str, weights_dir: Path) -> EncoderSpec | None:
    """The spec at that way of running it whose encoder id this is."""
    every = (run_as(spec, way) for way in dict.fromkeys((*ways(spec, "exact"), *ways(spec, "bulk"))))
    return next((each for each in every if encoder_id(each, weights_dir) == wanted), None)


def measured(weights_dir: Path) -> dict[str, Any]:
    """What was measured, {id of the eager encoder: {mode: {runtime, precision, ...}}}."""
    path = record_path(weights_dir)
    try:
        status = path.stat()
    except FileNotFoundError:
        return {}
    return _read(path, status.st_mtime_ns, status.st_size)


def record_path(weights_dir: Path) -> Path:
    return weights_dir / "runtimes.json"


@lru_cache(maxsize=4)
def _read(path: Path, _mtime_ns: int, _size: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        log.warning("%s is no JSON; encoders run plainly until they are calibrated again", path.name)
        return {}
    return found
