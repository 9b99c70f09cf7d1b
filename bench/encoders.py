"""How fast each way of running an encoder is, how exact, and how much of the machine it uses.

Every way is compared in one run with plain eager fp32 (PyTorch as it comes, in a process of its own) and
with the loop that CLEAR published, one image at a time. An image is one slice at one window. MambaOut
gets random weights, EfficientNet-Lite0 its own. Prints tables, and as its last line JSON.

    python bench/encoders.py [ENCODER ...]    default: mambaout_tiny efficientnet_lite0
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from models.calibrate import fastest, lowest_cosine, sample
from models.load import Encoder, load_encoder, load_network
from models.modes import COSINE, EAGER, Mode, Way, run_as, ways
from models.runtimes import CannotRun
from models.specs import EncoderSpec
from models.zoo import ENCODERS

ROUNDS = 5
PLAIN_SECONDS = 2.0
DEFAULT = ["mambaout_tiny", "efficientnet_lite0"]
PLAIN = "--plain"  # run as the plain process: spec name, weights directory

console = Console(width=110)


@dataclass
class Measured:
    images_per_s: float
    cosine: float  # the lowest of the batch, to eager fp32


def main() -> None:
    if PLAIN in sys.argv:
        plain(*sys.argv[2:])
        return
    figures = {}
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as folder:
        for name in sys.argv[1:] or DEFAULT:
            figures[name] = bench(ENCODERS[name], Path(folder))
    first, *rest = figures
    print(json.dumps(figures[first] | {name: figures[name] for name in rest}))


def bench(spec: EncoderSpec, weights: Path) -> dict[str, float]:
    make_weights(spec, weights)
    encoders = loaded(spec, weights)
    batch = sample(spec, encoders[EAGER].batch)
    images = batch.shape[0] * batch.shape[1]
    expected = encoders[EAGER].encode(batch)
    seconds: dict[Way, list[float]] = {way: [] for way in encoders}
    eager, loop = [], []
    peaks: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(ROUNDS):  # they take turns, so that all see the same machine
        for way, encoder in encoders.items():
            start = time.perf_counter()
            encoder.begin(batch)()
            seconds[way].append(time.perf_counter() - start)
        for precision, rates in peaks.items():
            rates.append(matmul_flops(precision))
        together, alone = plainly(spec, weights)
        eager.append(together)
        loop.append(alone)
    measured = {
        way: Measured(images / statistics.median(seconds[way]), lowest_cosine(each.encode(batch), expected))
        for way, each in encoders.items()
    }
    best_peaks = {precision: statistics.median(rates) for precision, rates in peaks.items()}
    return report(spec, measured, statistics.median(eager), statistics.median(loop), best_peaks, flops(encoders[EAGER]))


def make_weights(spec: EncoderSpec, weights: Path) -> None:
    """Random ones where the encoder does not come in a package: arithmetic takes the same time."""
    if spec.weights.source != "package":
        from models.encoders.timm_import import timm

        torch.manual_seed(0)
        save_file(timm.create_model(spec.network).state_dict(), weights / f"{spec.name}.safetensors")


def loaded(spec: EncoderSpec, weights: Path) -> dict[Way, Encoder]:
    encoders = {}
    for way in dict.fromkeys((*ways(spec, "bulk"), *ways(spec, "fast"))):
        try:
            with console.status(f"{spec.name}: making {way} ready"):
                encoders[way] = load_encoder(run_as(spec, way), weights)
        except CannotRun as error:
            console.print(f"{spec.name}: {error}")
    return encoders


def matmul_flops(precision: str) -> float:
    """FLOP/s of a 2048-wide product, the faster of PyTorch's own and oneDNN's prepacked."""
    size = 2048
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = torch.rand(size, size, dtype=dtype), torch.rand(size, size, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(b)
    products = [
        lambda: torch.nn.functional.linear(a, b),
        lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""),
    ]
    best = float("inf")
    with torch.inference_mode():
        for product in products:
            product()
            for _ in range(3):
                start = time.perf_counter()
                product()
                best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def flops(encoder: Encoder) -> float:
    """FLOP per image, products and sums counted apart."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        encoder.network(torch.rand(1, 1, *encoder.spec.input_shape[1:]))
    return float(counter.get_total_flops())


def plainly(spec: EncoderSpec, weights: Path) -> tuple[float, float]:
    """Images per second of plain eager fp32 in batches, and one image at a time, in a fresh process."""
    command = [sys.executable, __file__, PLAIN, spec.name, str(weights)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    together, alone = json.loads(answer.stdout.splitlines()[-1])
    return together, alone


def plain(name: str, weights: str) -> None:
    """What plainly() reads: the network as anyone would run it, without our allocator setting or runtimes."""
    spec = ENCODERS[name]
    network = load_network(spec, Path(weights))
    batch = torch.from_numpy(sample(spec, 8)).view(-1, 1, *spec.input_shape[1:]).expand(-1, 3, -1, -1).contiguous()
    rates = []
    with torch.inference_mode():
        for size in (len(batch), 1):
            network(batch[:size])
            images, start = 0, time.perf_counter()
            while time.perf_counter() - start < PLAIN_SECONDS:
                network(batch[:size])
                images += size
            rates.append(images / (time.perf_counter() - start))
    print(json.dumps(rates))


def report(
    spec: EncoderSpec,
    measured: dict[Way, Measured],
    eager: float,
    loop: float,
    peaks: dict[str, float],
    flop: float,
) -> dict[str, float]:
    table = Table("", "images/s", "over eager", "over CLEAR's loop", "cosine", "GFLOP/s", "of peak")
    table.title = (
        f"{spec.name}, {flop / 1e9:.1f} GFLOP an image, {torch.get_num_threads()} threads; matmul peak "
        f"fp32 {peaks['fp32'] / 1e9:.0f}, bf16 {peaks['bf16'] / 1e9:.0f} GFLOP/s; medians of {ROUNDS}"
    )

    def row(name: str, rate: float, cosine: str, peak: float) -> None:
        table.add_row(
            name,
            f"{rate:.1f}",
            f"{rate / eager:.2f}",
            f"{rate / loop:.2f}",
            cosine,
            f"{rate * flop / 1e9:.0f}",
            f"{rate * flop / peak:.2f}",
        )

    row("CLEAR's loop, plain, one at a time", loop, "1", peaks["fp32"])
    row("plain eager fp32, batch 16", eager, "1", peaks["fp32"])
    for way, each in measured.items():
        row(str(way), each.images_per_s, f"{each.cosine:.7f}", peaks[way.precision])
    console.print(table)
    exact, fast, bulk = (best(spec, mode, measured) for mode in ("exact", "fast", "bulk"))
    console.print(f"chosen: exact {exact}, fast {fast}, bulk {bulk}\n")
    return {
        "exact_over_eager": round(measured[exact].images_per_s / eager, 3),
        "exact_cosine": round(measured[exact].cosine, 8),
        "fast_over_published_loop": round(measured[fast].images_per_s / loop, 3),
        "fast_cosine": round(measured[fast].cosine, 8),
        "bulk_over_eager": round(measured[bulk].images_per_s / eager, 3),
        "bulk_cosine": round(measured[bulk].cosine, 8),
        "peak_share": round(measured[bulk].images_per_s * flop / peaks[bulk.precision], 3),
    }


def best(spec: EncoderSpec, mode: Mode, measured: dict[Way, Measured]) -> Way:
    """As `keyslice encoders calibrate` chooses."""
    exact_enough = [way for way in ways(spec, mode) if way in measured and measured[way].cosine >= COSINE[mode]]
    return fastest({way: measured[way].images_per_s for way in exact_enough})


if __name__ == "__main__":
    main()
