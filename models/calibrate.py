"""Which way of running an encoder is fastest on this machine, measured once and kept."""

import json
import logging
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from models.ct.phantom import chest
from models.ct.slices import encoder_input
from models.load import Encoder, load_encoder
from models.modes import COSINE, Mode, Way, measured, record_path, run_as, ways
from models.runtimes import CannotRun
from models.specs import EncoderSpec, encoder_id

ROUNDS = 5
CLEARLY = 1.1  # a more elaborate way must be faster by this factor: noise must not decide what an encoder is

log = logging.getLogger(__name__)


def calibrate(
    spec: EncoderSpec, mode: Mode, weights_dir: Path, note: Callable[[str], None] = log.info, again: bool = False
) -> dict[str, Any]:
    """Measure the ways this mode allows and keep the best; what was kept before, unless asked `again`.

    `spec` is the plain one, eager fp32. Raises MissingWeights or WrongWeights.
    """
    weights_dir.mkdir(parents=True, exist_ok=True)
    key = encoder_id(spec, weights_dir)
    with FileLock(weights_dir / "runtimes.lock"):
        known = measured(weights_dir)
        if again or mode not in known.get(key, {}):
            entry = _measure(spec, mode, weights_dir, note)
            known = known | {key: known.get(key, {}) | {mode: entry}}
            partial = weights_dir / "runtimes.part"
            partial.write_text(json.dumps(known, indent=1))
            partial.replace(record_path(weights_dir))
        found: dict[str, Any] = known[key][mode]
        return found


def _measure(spec: EncoderSpec, mode: Mode, weights_dir: Path, note: Callable[[str], None]) -> dict[str, Any]:
    if len(ways(spec, mode)) == 1:
        return _entry(ways(spec, mode)[0], {}, {})
    encoders, refused = _loaded(spec, mode, weights_dir, note)
    batch = sample(spec, next(iter(encoders.values())).batch)
    expected = next(iter(encoders.values())).begin(batch)()
    for way, encoder in list(encoders.items()):
        if (cosine := lowest_cosine(encoder.begin(batch)(), expected)) < COSINE[mode]:
            refused[way] = f"cosine {cosine:.7f} to eager fp32, expected {COSINE[mode]}"
            del encoders[way]
    rates = {way: len(batch) / seconds for way, seconds in medians(encoders, batch).items()}
    best = fastest(rates)
    for way, rate in rates.items():
        note(f"{spec.name}: {way}, {rate:.1f} slices/s{', chosen' if way == best else ''}")
    for way, why in refused.items():
        note(f"{spec.name}: {way} not used: {why}")
    return _entry(best, rates, refused)


def _loaded(
    spec: EncoderSpec, mode: Mode, weights_dir: Path, note: Callable[[str], None]
) -> tuple[dict[Way, Encoder], dict[Way, str]]:
    """The encoder run each way that this machine can, and why it cannot the others. Eager comes first."""
    encoders: dict[Way, Encoder] = {}
    refused: dict[Way, str] = {}
    for way in ways(spec, mode):
        note(f"{spec.name}: making {way} ready")
        try:
            encoders[way] = load_encoder(run_as(spec, way), weights_dir)
        except CannotRun as error:
            refused[way] = str(error)
    return encoders, refused


def medians(encoders: dict[Way, Encoder], batch: NDArray[np.float32]) -> dict[Way, float]:
    """Seconds per batch of each. They take turns, so that all see the same machine."""
    seconds: dict[Way, list[float]] = {way: [] for way in encoders}
    for _ in range(ROUNDS):
        for way, encoder in encoders.items():
            start = time.perf_counter()
            encoder.begin(batch)()
            seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(each) for way, each in seconds.items()}


def fastest(rates: dict[Way, float]) -> Way:
    """The fastest of ways that go from simple to elaborate, each counted only where it is clearly faster."""
    best = next(iter(rates))
    for way, rate in rates.items():
        if rate > CLEARLY * rates[best]:
            best = way
    return best


def sample(spec: EncoderSpec, count: int) -> NDArray[np.float32]:
    """(count, *spec.input_shape) of slices that look like CT: a phantom's. A volume is noise."""
    if spec.volume:
        return np.random.default_rng(0).random((count, *spec.input_shape), dtype=np.float32)
    hu = chest(seed=0, lesion=True, slices=count).hu
    return np.stack([encoder_input(each, spec.windows, spec.input_size) for each in hu])


def lowest_cosine(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The lowest cosine of two embeddings of one instance; (..., dim) each. NaN counts as -1."""
    a, b = found.astype(np.float64), expected.astype(np.float64)
    cosines = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
    return float(np.nan_to_num(cosines, nan=-1.0).min())


def _entry(best: Way, rates: dict[Way, float], refused: dict[Way, str]) -> dict[str, Any]:
    return {
        "runtime": best.runtime,
        "precision": best.precision,
        "slices_per_s": {str(way): round(rate, 2) for way, rate in rates.items()},
        "refused": {str(way): why for way, why in refused.items()},
        "machine": f"{platform.machine()}, torch {version('torch')}",
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
