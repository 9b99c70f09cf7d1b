"""Similar slices among a million stored vectors: how right, how fast, and how that compares.

Embeds real series by the service, fills its stores with perturbed copies of their bags, and has its index built. Then
searches for slices that are not stored: by our default, exactly, with filters and while a writer adds; in turns with
faiss's IVF_FLAT and HNSW and with numpy over the same vectors; and over HTTP. Recall is against the ten nearest of all
rows. The hard set is noise of 48 dimensions, of which an ANN index finds too little: there the fallback must answer.
Prints a table, and as its last line JSON.

    python bench/search.py [--rows 1000000] [--series ARCHIVE ...] [--folder KEPT]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from bench.copies import copies, draw, hard_set, real_bags, store
from bench.memory import peak_mb
from bench.neighbours import Floats, K, Kind, Search, all_rows, by_numpy, in_turns, recall, rivals, tenths
from service.embedded import Running, in_background
from service.indexing import index_bags, rebuild_index
from service.settings import Settings
from service.similar import Asked, QuerySlice, Way, search
from service.storage.keys import EmbeddingKey
from service.storage.selection import Narrowed, Wanted
from service.storage.stores import Stores, open_stores

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
QUERIES, FEW = 200, 20  # searches that are timed; FEW where one takes seconds
NOT_STORED, ADDED = 10_000_000, 20_000_000  # numbers of the first copy that is asked for, and that is added meanwhile
HOLDER = "bench"
REAL = "real.npz"
HARD_DIM = 512
AIM = 0.99  # recall that every index is brought to, if it can
FILTERS: dict[str, dict[str, Any]] = {
    "a date, half of the rows": {"date_from": "20240701"},
    "a manufacturer, a quarter": {"manufacturer": ("SIEMENS",)},
    "a tag, a hundredth": {"tags": ("chosen",)},
}
PLAIN, ANY, EXACT, WRITER = "its own window", "any window", "its own window, exact", "its own window, a writer adds"

console = Console(width=110)


@dataclass(frozen=True)
class Line:
    """One way of searching."""

    name: str
    p50: float  # ms
    p95: float
    recall: float | None = None


@dataclass(frozen=True)
class Measured:
    ours: list[Line]
    turns: list[Line]  # ours again, and the others, in turns
    way: str
    peak_mb: float  # of a process that has only searched by our index


class Searcher:
    """Our own search, in this process."""

    def __init__(self, data: Path, encoder_id: str) -> None:
        self.settings = Settings(data_dir=data)
        self.stores: Stores = open_stores(self.settings)
        self.encoder_id = encoder_id
        self.row = self.stores.indexes.started(encoder_id)
        key, content = next(iter(self.stores.indexes.embedded(encoder_id).items()))
        self.windows: list[str] = self.stores.bags.receipt(EmbeddingKey(key, encoder_id), content)["windows"]
        self.way: Way | None = None

    def narrowed(self, wanted: dict[str, Any]) -> Narrowed:
        return self.stores.selection.narrowed(self.encoder_id, Wanted(**wanted), "none", [])

    def cosines(
        self, vector: Floats, window: str | None, wanted: dict[str, Any] | None = None, *, exact: bool = False
    ) -> list[float]:
        """As POST /v1/search does it, filters asked of the catalog every time."""
        asked = Asked([QuerySlice({window: vector}, window)], K, "any" if window is None else "same", exact=exact)
        narrowed, wish = self.narrowed(wanted or {}), self.settings.index_recall
        hits, self.way = search(asked, self.encoder_id, narrowed, wish, self.stores, lambda: None)
        return [hit["score"] for hit in hits]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--hard-rows", type=int, default=100_000)
    parser.add_argument("--series", type=Path, nargs="*", default=sorted(DATA.glob("*/*.tar.xz")), help="of DICOM")
    parser.add_argument("--folder", type=Path, help="where the stores are kept, to be used again")
    parser.add_argument("--no-hnsw", action="store_true", help="without HNSW, which takes longest to build")
    parser.add_argument("--measure", nargs=2, metavar=("DATA", "ENCODER"), help=argparse.SUPPRESS)
    parser.add_argument("--add", nargs=2, metavar=("DATA", "ENCODER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(asdict(measure(Path(asked.measure[0]), asked.measure[1], hnsw=not asked.no_hnsw))))
    elif asked.add:
        add_for_ever(Path(asked.add[0]), asked.add[1])
    else:
        with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name:
            run(asked.folder or Path(name), asked.rows, asked.hard_rows, asked.series, hnsw=not asked.no_hnsw)


def run(folder: Path, rows: int, hard_rows: int, series: Sequence[Path], *, hnsw: bool) -> None:
    data = folder / "copies"
    with console.status("embed the real series"):
        encoder_id, windows = embed_real(series, data)
    with console.status(f"store {rows} rows and build their index"):
        seconds, share = fill(data, encoder_id, windows, rows)
    with console.status("search"):
        found = measured_apart(data, encoder_id, hnsw=hnsw)
    with console.status("search over HTTP"):
        http = over_http(data, encoder_id)
    with console.status("the hard set"):
        hard = hard_line(folder / "hard", hard_rows)
    report(rows, seconds, share, found, http, hard)


def embed_real(series: Sequence[Path], data: Path) -> tuple[str, list[str]]:
    """By a service of our own; the id and the windows of its encoder. What is there already is not embedded again."""
    if not series:
        raise SystemExit(f"no series in {DATA}, name archives of DICOM by --series")
    with _service(data) as running:
        for path in series:
            with path.open("rb") as file:
                answer = httpx.post(f"{running.address}/v1/series", files={"files": (path.name, file)}, timeout=600)
            job = f"{running.address}/v1/jobs/{answer.raise_for_status().json()['job_id']}"
            while httpx.get(job, timeout=60).json()["state"] in ("queued", "running"):
                time.sleep(0.5)
        encoders = httpx.get(f"{running.address}/v1/encoders", timeout=60).json()["encoders"]
    mine = next(each for each in encoders if each["default"])
    return mine["encoder_id"], [each["name"] for each in mine["windows"]]


def fill(data: Path, encoder_id: str, windows: list[str], rows: int) -> tuple[float, float]:
    """Seconds that the index took to build, of all rows, and its size over that of the float16 vectors."""
    settings = Settings(data_dir=data)
    stores = open_stores(settings)
    seconds = 0.0
    if stores.indexes.rows(encoder_id) < rows:
        np.savez(data / REAL, *real_bags(encoder_id, stores))
        store(copies(kept_bags(data), 0, 0), rows, encoder_id, windows, data, stores)
        started = time.perf_counter()
        if not rebuild_index(encoder_id, stores, settings, HOLDER):
            raise SystemExit("another process writes the index")
        seconds = time.perf_counter() - started
    table = stores.indexes.started(encoder_id).table_name
    share = stores.index.size_bytes(table) / (2 * stores.index.count(table) * kept_bags(data)[0].shape[2])
    stores.close()
    return seconds, share


def measured_apart(data: Path, encoder_id: str, *, hnsw: bool) -> Measured:
    command = [sys.executable, __file__, "--measure", str(data), encoder_id, *([] if hnsw else ["--no-hnsw"])]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    said = json.loads(output.splitlines()[-1])
    lines = {part: [Line(**each) for each in said.pop(part)] for part in ("ours", "turns")}
    return Measured(**lines, **said)


def measure(data: Path, encoder_id: str, *, hnsw: bool) -> Measured:
    """In a process that has done nothing else: first our own searches and their memory, then the others beside them."""
    ours = Searcher(data, encoder_id)
    queries = draw(copies(kept_bags(data), NOT_STORED, 1), QUERIES)
    vectors, windows = np.stack([vector for _, vector in queries]), [ours.windows[at] for at, _ in queries]

    def of(wanted: dict[str, Any], *, exact: bool = False) -> Search:
        return lambda query: ours.cosines(vectors[query], windows[query], wanted, exact=exact)

    searches = {PLAIN: of({})} | {name: of(wanted) for name, wanted in FILTERS.items()}
    seconds, found = in_turns(searches, QUERIES)
    way = ours.way
    slow, exactly = in_turns({EXACT: of({}, exact=True)}, FEW)
    peak = peak_mb()

    kinds = {PLAIN: Kind(), ANY: Kind(own_window=False)}
    for name, wanted in FILTERS.items():
        only = frozenset(ours.stores.selection.series(encoder_id, Wanted(**wanted)))
        kinds[name] = Kind(series=only)
    table = ours.row.table_name
    true = tenths(ours.stores.index, table, vectors, windows, kinds)
    lines = [_line(name, took, recall(found[name], true[name])) for name, took in seconds.items()]
    lines.append(_line(EXACT, slow[EXACT], recall(exactly[EXACT], true[PLAIN][:FEW])))
    turns = beside(ours, vectors, true[ANY], hnsw=hnsw)
    with adding(data, encoder_id):  # last, for it changes what is true
        writing, _ = in_turns({WRITER: of({})}, QUERIES)
    return Measured([*lines, _line(WRITER, writing[WRITER])], turns, _said(way), round(peak, 1))


def beside(ours: Searcher, vectors: Floats, tenth: Floats, *, hnsw: bool) -> list[Line]:
    """Over every row, of whatever window: ours in turns with each of the others."""
    lines, rows = [], all_rows(ours.stores.index, ours.row.table_name)
    mine: Search = lambda query: ours.cosines(vectors[query], None)  # noqa: E731
    for name, other in rivals(rows, vectors, tenth, AIM, hnsw):
        seconds, found = in_turns({f"Keyslice, beside {name.partition(',')[0]}": mine, name: other}, QUERIES)
        lines += [_line(each, seconds[each], recall(found[each], tenth)) for each in seconds]
    seconds, found = in_turns({"numpy, every row": by_numpy(rows, vectors)}, FEW)
    return lines + [_line(each, seconds[each], recall(found[each], tenth[:FEW])) for each in seconds]


@contextmanager
def adding(data: Path, encoder_id: str) -> Iterator[None]:
    """Meanwhile a process embeds and indexes one series after another."""
    command = [sys.executable, __file__, "--add", str(data), encoder_id]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()  # it has begun
        yield
        process.kill()


def add_for_ever(data: Path, encoder_id: str) -> None:
    ours = Searcher(data, encoder_id)
    made = copies(kept_bags(data), ADDED + os.getpid(), os.getpid())
    while True:
        store(made, 1, encoder_id, ours.windows, data, ours.stores, at_once=1)
        index_bags(ours.stores, ours.settings, HOLDER)
        print("added", flush=True)


def over_http(data: Path, encoder_id: str) -> list[Line]:
    """Stored slices asked for by a caller, in turns with the same searches in this process."""
    ours = Searcher(data, encoder_id)
    random = np.random.default_rng(2)
    contents = ours.stores.indexes.embedded(encoder_id)
    asked: list[dict[str, Any]] = []
    vectors = []
    for uid in random.choice(sorted(contents), QUERIES):
        bag = ours.stores.bags.get(EmbeddingKey(str(uid), encoder_id), contents[str(uid)])
        number, at = int(random.integers(len(bag))), int(random.integers(bag.shape[1]))
        asked.append({"series_uid": str(uid), "slice": number, "window": ours.windows[at], "k": K})
        vector = bag[number, at].astype(np.float32)
        vectors.append(vector / np.linalg.norm(vector))
    with _service(data) as running, httpx.Client(base_url=running.address, timeout=60) as http:

        def post(query: int) -> list[float]:
            answer = http.post("/v1/search", json=asked[query]).raise_for_status().json()
            return [hit["score"] for hit in answer["hits"]]

        here: Search = lambda query: ours.cosines(vectors[query], asked[query]["window"])  # noqa: E731
        seconds, _ = in_turns({"in this process": here, "over HTTP": post}, QUERIES)
    ours.stores.close()
    return [_line(name, took) for name, took in seconds.items()]


def hard_line(data: Path, rows: int) -> Line:
    """The recall of what our search answers, whatever it takes."""
    settings = Settings(data_dir=data)
    stores = open_stores(settings)
    encoder_id, windows = "hard@000000000000", ["one", "other"]
    if not stores.indexes.rows(encoder_id):
        data.mkdir(parents=True, exist_ok=True)
        store(hard_set(HARD_DIM, len(windows), 0), rows, encoder_id, windows, data, stores)
        rebuild_index(encoder_id, stores, settings, HOLDER)
    stores.close()
    ours = Searcher(data, encoder_id)
    queries = draw(hard_set(HARD_DIM, len(windows), 1), QUERIES)
    vectors, names = np.stack([vector for _, vector in queries]), [windows[at] for at, _ in queries]
    search_hard: Search = lambda query: ours.cosines(vectors[query], names[query])  # noqa: E731
    seconds, found = in_turns({"hard set": search_hard}, FEW)
    true = tenths(ours.stores.index, ours.row.table_name, vectors[:FEW], names[:FEW], {PLAIN: Kind()})
    line = _line(
        f"hard set, {rows} rows: {_said(ours.way)}", seconds["hard set"], recall(found["hard set"], true[PLAIN])
    )
    ours.stores.close()
    return line


def kept_bags(data: Path) -> list[Floats]:
    """The real series' embeddings that the copies are made of."""
    with np.load(data / REAL) as kept:
        return [kept[name].astype(np.float32) for name in sorted(kept)]


def _service(data: Path) -> AbstractContextManager[Running]:
    weights = os.environ.get("KEYSLICE_WEIGHTS_DIR", str(data / "weights"))
    return in_background(data, KEYSLICE_WEIGHTS_DIR=weights)


def _line(name: str, seconds: Sequence[float], found: float | None = None) -> Line:
    """Said at once as well: the whole takes long."""
    p50, p95 = np.percentile(np.array(seconds) * 1e3, [50, 95])
    line = Line(name, round(float(p50), 2), round(float(p95), 2), None if found is None else round(found, 4))
    print(line, file=sys.stderr, flush=True)
    return line


def _said(way: Way | None) -> str:
    assert way is not None  # a search was made
    effort = f", {way.effort.nprobes} partitions, refine {way.effort.refine}" if way.effort else ""
    return f"{way.index}{effort}"


def report(rows: int, seconds: float, share: float, found: Measured, http: Sequence[Line], hard: Line) -> None:
    title = f"{rows} rows of copies of real embeddings, k = {K}; our index: {found.way}; {os.cpu_count()} cores"
    table = Table("", "p50, ms", "p95, ms", f"recall@{K}", title=title)
    for part in (found.ours, found.turns, http, [hard]):
        for line in part:
            said = "" if line.recall is None else f"{line.recall:.3f}"
            table.add_row(line.name, f"{line.p50:.1f}", f"{line.p95:.1f}", said)
        table.add_section()
    table.add_row(
        f"index of all rows, built in {seconds:.0f} s: size over the float16 vectors'", "", f"{share:.2f}", ""
    )
    table.add_row("peak memory of the process that searched", "", f"{found.peak_mb:.0f} MB", "")
    console.print(table)
    ours = {line.name: line for line in found.ours}
    mine, ivf = found.turns[0], found.turns[1]
    figures = {
        "recall_at_10": ours[PLAIN].recall,
        "p95_ms": ours[PLAIN].p95,
        "p95_over_faiss_ivf": round(mine.p95 / ivf.p95, 3),
        "http_added_p95_ms": round(http[1].p95 - http[0].p95, 2),
        "filtered_over_plain": round(max(ours[name].p95 for name in FILTERS) / ours[PLAIN].p95, 3),
        "peak_mb": found.peak_mb,
        "hard_recall_at_10": hard.recall,
        "disk_over_vectors": round(share, 3),
        "writing_p95_ms": ours[WRITER].p95,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
