"""What is lost when everything dies: small series go through API, broker and two workers that are killed all the while.

Embeds the same series twice: once undisturbed, and once while API, workers, their decoding processes, the writer of the
index and the broker are killed by SIGKILL at random moments, the catalog refuses writes for longer than anybody waits
for it, and, where this user may mount a small disk, that disk is full. Senders try again what was not accepted. Then
the service is started once more, and every series is compared with the undisturbed run: its state, its bag, its rows in
the index, and what is left over. Prints a table, and as its last line JSON.

    python bench/chaos.py [--series 200] [--seconds 240] [--seed 0]
"""

import argparse
import io
import json
import os
import random
import signal
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Empty, Queue

import httpx
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from models.ct.phantom import Identity, ct_slice
from service.embedded import free_port, in_background, parts
from service.indexing import LEASE
from service.settings import Settings
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores, open_stores
from service.storage.tables import LeaseRow

SLICES, SIZE, SPACING = 6, 64, (5.0, 1.0, 1.0)  # of a series; pixels; mm
SENDERS = 4
PAUSE_SECONDS = 0.5, 3.0  # between two disturbances
DISK_MB, FULL_SECONDS, AWAY_SECONDS = 512, 4.0, 35.0  # a writer waits 30 s for SQLite
END_SECONDS = 900.0  # for the last series, after the last disturbance
QUICK = {  # the rest is as always
    "KEYSLICE_SWEEP_SECONDS": "1",
    "KEYSLICE_STALE_SECONDS": "5",
    "KEYSLICE_MAX_ATTEMPTS": "1000",  # a series is not at fault for what happens here
    "KEYSLICE_INDEX_UPKEEP_SECONDS": "5",
    "KEYSLICE_MIN_FREE_BYTES": "0",  # or nothing would ever find the disk full
}

console = Console(width=100)


@dataclass(frozen=True)
class Found:
    """What became of the series."""

    series: int
    kills: int
    lost: int  # not indexed, or without a bag
    duplicated: int  # with more than one bag, or more rows in the index than slices times windows
    differing: int  # bag or rows other than in the undisturbed run
    left_over: int  # files in staging, and bags half-written


class Disturbed:
    """The service's processes, two workers among them, each started again when it dies."""

    def __init__(self, settings: Settings, data: Path, run_dir: Path) -> None:
        self.settings = settings
        children = parts(settings, data, run_dir)
        (worker,) = [each for each in children if each.name == "worker"]
        self._log = (data / "keyslice.log").open("ab")
        self.children = [
            replace(each, output=self._log, environment=each.environment | QUICK)
            for each in (*children, replace(worker, name="worker 2"))
        ]
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    def __enter__(self) -> "Disturbed":
        for child in self.children:
            child.start()
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._keeper.join()
        for child in reversed(self.children):
            child.stop()
        self._log.close()

    def _keep(self) -> None:
        while not self._over.wait(0.2):
            for child in self.children:
                child.revive()

    def pids(self, name: str) -> list[int]:
        found = [each.process for each in self.children if each.name.startswith(name)]
        return [process.pid for process in found if process and process.poll() is None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--series", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=240.0, help="for which it is disturbed")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-", ignore_cleanup_errors=True) as name:
        found, counts = run(Path(name), asked.series, asked.seconds, random.Random(asked.seed))
    report(found, counts, asked.seconds)


def run(folder: Path, count: int, seconds: float, dice: random.Random) -> tuple[Found, Counter[str]]:
    """What became of so many series, and how often each kind of disturbance came."""
    names = [f"CHAOS-{number:04d}" for number in range(count)]
    weights = os.environ.get("KEYSLICE_WEIGHTS_DIR", str(folder / "weights"))
    with console.status("undisturbed"), in_background(folder / "calm", KEYSLICE_WEIGHTS_DIR=weights) as running:
        send(running.address, names)
        wait_until_indexed(running.address, count)
    with small_disk(folder / "disk") as full, tempfile.TemporaryDirectory(prefix="ks-") as run_dir:
        data = folder / "disk" / "data"
        with console.status("disturbed"):
            port = free_port("127.0.0.1", 0)
            settings = Settings(data_dir=data, port=port, weights_dir=Path(weights))
            data.mkdir(parents=True)
            with Disturbed(settings, data, Path(run_dir)) as service:
                wait_until_indexed(address := f"http://127.0.0.1:{port}", 0)
                counts = disturb(service, address, names, seconds, full, dice)
        with console.status("started once more"), in_background(data, KEYSLICE_WEIGHTS_DIR=weights) as running:
            wait_until_indexed(running.address, count)
        found = compare(folder / "calm", data, names, sum(n for kind, n in counts.items() if kind.startswith("kill")))
    return found, counts


def disturb(
    service: Disturbed,
    address: str,
    names: Sequence[str],
    seconds: float,
    full: Callable[[], None] | None,
    dice: random.Random,
) -> Counter[str]:
    """Send the series and disturb the service meanwhile, for so many seconds and until all is sent."""
    kinds: dict[str, Callable[[], bool]] = {
        "kill the API": lambda: kill(service.pids("api"), dice),
        "kill a worker": lambda: kill(service.pids("worker"), dice),
        "kill a decoding process": lambda: kill(decoders(service), dice),
        "kill the broker": lambda: kill(service.pids("broker"), dice),
        "kill the index's writer": lambda: kill(index_writer(service), dice),
        "catalog away": lambda: lock_catalog(service.settings),
    }
    if full:
        kinds["disk full"] = lambda: full() or True
    senders = threading.Thread(target=send, args=(address, names), daemon=True)
    senders.start()
    counts: Counter[str] = Counter()
    end = time.monotonic() + seconds
    rare = [kind for kind in kinds if not kind.startswith("kill")]
    while time.monotonic() < end or senders.is_alive():
        time.sleep(dice.uniform(*PAUSE_SECONDS))
        kind = dice.choice([each for each in kinds if each not in rare] * 3 + rare)
        if kind in rare and counts[kind] > 1:
            continue
        counts[kind] += kinds[kind]()
    return counts


def send(address: str, names: Sequence[str]) -> None:
    """Post every series, again and again until it is accepted, as a careful sender does."""
    waiting: Queue[int] = Queue()
    for number in range(len(names)):
        waiting.put(number)

    def work() -> None:
        with httpx.Client(base_url=address, timeout=120) as http:
            while True:
                try:
                    number = waiting.get_nowait()
                except Empty:
                    return
                files = [("files", (f"{k}.dcm", content)) for k, content in enumerate(slices(names[number], number))]
                while not accepted(http, files):
                    time.sleep(0.5)

    threads = [threading.Thread(target=work) for _ in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def accepted(http: httpx.Client, files: list[tuple[str, tuple[str, bytes]]]) -> bool:
    with suppress(httpx.TransportError):
        return http.post("/v1/series", files=files).status_code == httpx.codes.ACCEPTED
    return False


def slices(name: str, seed: int) -> Iterator[bytes]:
    noise, identity = np.random.default_rng(seed), Identity(name)
    for number in range(SLICES):
        hu = noise.normal(0, 200, (SIZE, SIZE)).astype(np.float32).clip(-1000, 1000)
        content = io.BytesIO()
        ct_slice(hu, number * SPACING[0], number, SPACING, identity).save_as(content, enforce_file_format=True)
        yield content.getvalue()


def wait_until_indexed(address: str, count: int) -> None:
    """Or until it is enough; then the comparison says what is missing."""
    end = time.monotonic() + END_SECONDS
    while time.monotonic() < end:
        with suppress(httpx.TransportError):
            listed = httpx.get(f"{address}/v1/series", params={"state": "indexed", "limit": 1000}, timeout=60)
            if listed.is_success and len(listed.json()["series"]) >= count:
                return
        time.sleep(0.5)


def kill(pids: Sequence[int], dice: random.Random) -> bool:
    """One of them, and what it has started; False where there is none."""
    if not pids:
        return False
    with suppress(psutil.NoSuchProcess):
        victim = psutil.Process(dice.choice(pids))
        for each in [victim, *victim.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(signal.SIGKILL)
        return True
    return False


def decoders(service: Disturbed) -> list[int]:
    found = []
    for pid in service.pids("worker"):
        with suppress(psutil.NoSuchProcess):
            found += [each.pid for each in psutil.Process(pid).children() if "spawn_main" in " ".join(each.cmdline())]
    return found


def index_writer(service: Disturbed) -> list[int]:
    """The worker that holds the lease of the index's writer, once there is one."""
    stores = open_stores(service.settings)
    end = time.monotonic() + 5.0
    try:
        while time.monotonic() < end:
            with suppress(Exception), stores.database.read() as session:  # the catalog may be away too
                row = session.get(LeaseRow, LEASE)
                pid = int(row.holder.split(":")[1]) if row else 0
                if pid in service.pids("worker"):
                    return [pid]
            time.sleep(0.01)
    finally:
        stores.close()
    return []


def lock_catalog(settings: Settings) -> bool:
    """Nobody else writes for longer than SQLite is waited for."""
    with closing(sqlite3.connect(settings.data_dir / "catalog.db", timeout=60, isolation_level=None)) as catalog:
        catalog.execute("BEGIN IMMEDIATE")
        time.sleep(AWAY_SECONDS)
        catalog.execute("ROLLBACK")
    return True


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None] | None]:
    """A directory on a disk of its own, and what fills it for some seconds; None where none may be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "keyslice-bench", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False

    def fill() -> None:
        ballast = folder / "ballast"
        with suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(2**20))
                file.flush()
        time.sleep(FULL_SECONDS)
        ballast.unlink()

    try:
        yield fill if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=False)


def compare(calm: Path, disturbed: Path, names: Sequence[str], kills: int) -> Found:
    """Bags bit by bit, rows of the index against bags, and what nobody needs any more."""
    ours, theirs = open_stores(Settings(data_dir=disturbed)), open_stores(Settings(data_dir=calm))
    (encoder_id,) = theirs.indexes.encoders()
    expected, found = theirs.indexes.embedded(encoder_id), ours.indexes.embedded(encoder_id)
    rows = ours.index.counts(ours.indexes.started(encoder_id).table_name)
    lost = duplicated = differing = 0
    for name in names:
        uid = Identity(name).series_uid
        if uid not in found or uid not in rows or ours.catalog.series(uid).state != "indexed":
            lost += 1
            continue
        bag = ours.bags.get(EmbeddingKey(uid, encoder_id), found[uid])
        same = np.array_equal(bag, theirs.bags.get(EmbeddingKey(uid, encoder_id), expected[uid]))
        differing += not (same and np.array_equal(bag, indexed(ours, encoder_id, uid, bag.shape)))
        duplicated += ours.bags.count(uid) > 1 or rows[uid] > bag.shape[0] * bag.shape[1]
    staged = [path for path in (disturbed / "staging").rglob("*") if path.is_file()]
    partial = list((disturbed / "bags").glob("*/*/.*"))
    extra = len(rows.keys() - expected.keys())
    ours.close()
    theirs.close()
    return Found(len(names), kills, lost, duplicated + extra, differing, len(staged) + len(partial))


def indexed(stores: Stores, encoder_id: str, uid: str, shape: tuple[int, ...]) -> np.ndarray:
    """The series' rows as a bag; zeros where one is missing."""
    table = stores.index.rows(stores.indexes.started(encoder_id).table_name, f"series_uid = '{uid}'")
    key, content = EmbeddingKey(uid, encoder_id), stores.indexes.embedded(encoder_id)[uid]
    windows = stores.bags.receipt(key, content)["windows"]
    bag = np.zeros(shape, np.float16)
    for row in table.select(["slice", "window", "vector"]).to_pylist():
        bag[row["slice"], windows.index(row["window"])] = row["vector"]
    return bag


def report(found: Found, counts: Counter[str], seconds: float) -> None:
    table = Table("", "", title=f"{found.series} series of {SLICES} slices, disturbed for {seconds:.0f} s")
    for kind, number in sorted(counts.items()):
        table.add_row(kind, str(number))
    table.add_section()
    for name, number in asdict(found).items():
        table.add_row(name.replace("_", " "), str(number))
    console.print(table)
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
