"""Many at once: readers who ask again and again while others upload, for a bounded time.

Starts the service, embeds some small synthetic series and has a head trained on them. Then 200 readers each ask,
wait, and ask again, for pages of series, embeddings, slices as PNG, similar slices, predictions and attention, while 8
senders post one new series after another, which a worker embeds. `GET /healthz`, asked as often as the rest, is what
any answer costs under this load. Anything but the answer expected is an error. Prints a table, and as its last line
JSON.

    python bench/load.py [--readers 200] [--senders 8] [--seconds 180] [--pause 2.0]
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from bench.chaos import SLICES, send, slices, wait_until_indexed
from models.ct.phantom import Identity
from service.embedded import Running, in_background

READ = 24  # series that are read, a patient each
MB = 2**20
SAMPLE_SECONDS = 1.0
WARM_SHARE = 0.25  # of the time, after which memory counts
NPY = {"Accept": "application/x-npy"}
EPOCHS = "20"

Ask = Callable[[httpx.AsyncClient, random.Random], Awaitable[httpx.Response]]
console = Console(width=110)


@dataclass
class Seen:
    """What callers saw, and how large the API was."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: Counter[str] = field(default_factory=Counter)
    api_mb: list[tuple[float, float]] = field(default_factory=list)  # at which second


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--senders", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=180.0)
    parser.add_argument("--pause", type=float, default=2.0, help="mean of seconds that a reader waits before it asks")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-", ignore_cleanup_errors=True) as folder:
        seen = run(Path(folder), asked.readers, asked.senders, asked.seconds, asked.pause)
    report(seen, asked.readers, asked.senders, asked.seconds)


def run(folder: Path, readers: int, senders: int, seconds: float, pause: float) -> Seen:
    """What so many callers saw of a service of their own."""
    names = [f"LOAD-{number:04d}" for number in range(READ)]
    with in_background(folder / "data") as running:
        with console.status("embedding what is read, training a head"):
            send(running.address, names)
            wait_until_indexed(running.address, len(names))
            head = train(running.address, names)
        with console.status(f"{readers} readers, {senders} senders"):
            return asyncio.run(load(running, kinds(names, head), readers, senders, seconds, pause))


def train(address: str, names: Sequence[str]) -> str:
    """The id of a head that tells every second patient from the others, as far as noise can be told."""
    labels = "patient_id,noise\n" + "".join(f"{name},{k % 2}\n" for k, name in enumerate(names))
    with httpx.Client(base_url=address, timeout=120) as http:
        answer = http.post("/v1/heads", files={"labels": ("labels.csv", labels)}, data={"epochs": EPOCHS})
        asked = answer.raise_for_status().json()
        while (job := http.get(f"/v1/jobs/{asked['job_id']}").raise_for_status().json())["state"] != "done":
            if job["state"] == "failed":
                raise RuntimeError(f"no head: {job}")
            time.sleep(0.5)
    return str(asked["head_id"])


def kinds(names: Sequence[str], head: str) -> dict[str, Ask]:
    """What a reader may ask for."""
    uids = {name: Identity(name).series_uid for name in names}

    def series(dice: random.Random) -> str:
        return f"/v1/series/{uids[dice.choice(names)]}"

    def query(dice: random.Random) -> dict[str, Any]:
        asked = {"series_uid": uids[dice.choice(names)], "slice": dice.randrange(SLICES), "window": "lung"}
        return {**asked, "k": 10, "exclude": "patient"}

    return {
        "GET /healthz": lambda http, _: http.get("/healthz"),
        "page of series": lambda http, _: http.get("/v1/series", params={"limit": 50}),
        "one series": lambda http, dice: http.get(series(dice)),
        "embeddings, npy": lambda http, dice: http.get(f"{series(dice)}/embeddings", headers=NPY),
        "a slice, PNG": lambda http, dice: http.get(f"{series(dice)}/slices/{dice.randrange(SLICES)}/image"),
        "similar slices": lambda http, dice: http.post("/v1/search", json=query(dice)),
        "prediction": lambda http, dice: http.get(
            f"/v1/patients/{dice.choice(names)}/predictions", params={"head": head}
        ),
        "attention": lambda http, dice: http.get(f"{series(dice)}/attention", params={"head": head}),
    }


async def load(
    running: Running, asks: dict[str, Ask], readers: int, senders: int, seconds: float, pause: float
) -> Seen:
    """Readers and senders, each with a connection of its own, until the time is over."""
    seen, end = Seen(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=readers + senders, max_keepalive_connections=readers + senders)
    async with httpx.AsyncClient(base_url=running.address, timeout=60, limits=limits) as http:
        everybody = [read(http, asks, seen, end, pause, random.Random(number)) for number in range(readers)]
        everybody += [upload(http, seen, end, number) for number in range(senders)]
        await asyncio.gather(*everybody, watch(api(running), seen, end))
    return seen


async def read(
    http: httpx.AsyncClient, asks: dict[str, Ask], seen: Seen, end: float, pause: float, dice: random.Random
) -> None:
    while time.monotonic() < end:
        await asyncio.sleep(dice.expovariate(1 / pause))
        kind = dice.choice(list(asks))
        await timed(kind, asks[kind](http, dice), httpx.codes.OK, seen)


async def upload(http: httpx.AsyncClient, seen: Seen, end: float, sender: int) -> None:
    number = 0
    while time.monotonic() < end:
        number += 1
        name = f"NEW-{sender}-{number}"
        contents = await asyncio.to_thread(lambda: [*slices(name, sender * 10_000 + number)])  # noqa: B023  awaited
        files = [("files", (f"{k}.dcm", content)) for k, content in enumerate(contents)]
        await timed("upload", http.post("/v1/series", files=files), httpx.codes.ACCEPTED, seen)


async def timed(kind: str, asked: Awaitable[httpx.Response], expected: int, seen: Seen) -> None:
    started = time.monotonic()
    try:
        status = (await asked).status_code
    except httpx.HTTPError as error:
        seen.errors[f"{kind}: {type(error).__name__}"] += 1
        return
    if status != expected:
        seen.errors[f"{kind}: {status}"] += 1
    seen.seconds[kind].append(time.monotonic() - started)


async def watch(process: psutil.Process, seen: Seen, end: float) -> None:
    started = time.monotonic()
    while time.monotonic() < end:
        seen.api_mb.append((time.monotonic() - started, process.memory_info().rss / MB))
        await asyncio.sleep(SAMPLE_SECONDS)


def api(running: Running) -> psutil.Process:
    children = psutil.Process(running.process.pid).children()
    return next(each for each in children if "uvicorn" in each.cmdline())


def memory(seen: Seen) -> tuple[float, float]:
    """MB of the API once warm, and by how many it was larger at the end: medians of the second and the last quarter."""
    size = [mb for _, mb in seen.api_mb]
    quarter = max(1, int(len(size) * WARM_SHARE))
    warm, last = statistics.median(size[quarter : 2 * quarter]), statistics.median(size[-quarter:])
    return warm, last - warm


def report(seen: Seen, readers: int, senders: int, seconds: float) -> None:
    table = Table("", "answers", "p50, ms", "p95, ms", "p99, ms", title=f"{readers} readers, {senders} senders")
    for kind, found in sorted(seen.seconds.items()):
        table.add_row(kind, str(len(found)), *(f"{each:.0f}" for each in percentiles(found)))
    reads = [each for kind, found in seen.seconds.items() if kind != "upload" for each in found]
    p50, p95, p99 = percentiles(reads)
    table.add_section()
    table.add_row("reads together", str(len(reads)), *(f"{each:.0f}" for each in (p50, p95, p99)))
    console.print(table)
    for what, times in seen.errors.most_common():
        console.print(f"{times} x {what}", style="red")
    warm, growth = memory(seen)
    floor = percentiles(seen.seconds["GET /healthz"])
    figures = {
        "errors": seen.errors.total(),
        "reads_per_s": round(len(reads) / seconds, 1),
        "uploads": len(seen.seconds["upload"]),
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "healthz_p50_ms": round(floor[0], 1),
        "healthz_p95_ms": round(floor[1], 1),
        "api_warm_mb": round(warm),
        "memory_growth_mb": round(growth, 1),
    }
    print(json.dumps(figures))


def percentiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """50th, 95th and 99th, in ms."""
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1000
    return float(p50), float(p95), float(p99)


if __name__ == "__main__":
    main()
