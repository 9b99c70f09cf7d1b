"""What is left of an export when it ends, and what `keyslice embed` says of it: rows, exit status, Ctrl-C."""

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import sqlalchemy
from posting import slice_files, wait
from pydicom.dataset import FileDataset

from models.ct.phantom import Identity
from service.exports import file_uri
from service.queue import Queue
from service.settings import Settings
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores
from service.storage.tables import ExportFileRow, ExportRow
from workers.exports import run_export

ENCODER = "toy@0"
ONE, TWO = Identity("ENDS-1"), Identity("ENDS-2")
VERDICT = {"status": "accepted", "findings": [], "set_aside": []}
CALIBRATED = 180.0  # seconds: the first service of a run measures how to run its encoder


def put(folder: Path, identity: Identity, count: int = 3, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in slice_files(identity, count=count, **options):
        (folder / f"{identity.patient_id}-{name}").write_bytes(content)


class Embeds(Queue):
    """Commits an embedding of whatever is asked for, or makes the export fail."""

    def __init__(self, settings: Settings, stores: Stores) -> None:
        super().__init__(settings, stores)
        self.settings, self.stores = settings, stores
        self.stops = False

    def embed(self, keys: list[EmbeddingKey], *_, **__) -> None:
        if self.stops:
            raise TypeError
        for key in keys:
            content, slices = self.stores.archive.content(key.series_uid)
            self.stores.catalog.commit(key, content, slices, VERDICT, {})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two series of three files each, and a note."""
    put(tmp_path / "in", ONE)
    put(tmp_path / "in", TWO)
    (tmp_path / "in" / "notes.txt").write_text("a note")
    return tmp_path / "in"


@pytest.fixture
def queue(stores: Stores, tmp_path: Path) -> Iterator[Embeds]:
    queue = Embeds(Settings(data_dir=tmp_path / "data", broker_url="memory://"), stores)
    yield queue
    queue.close()


def begin(stores: Stores, folder: Path, dry_run: bool = False) -> tuple[str, bool]:
    row, resumed = stores.exports.add(file_uri(os.fsencode(folder)), ENCODER, {"dry_run": dry_run})
    return row.export_id, resumed


def run(stores: Stores, queue: Embeds, export_id: str) -> str:
    """Its state in the end."""
    run_export(export_id, stores, queue.settings, queue)
    return stores.exports.get(export_id).state


def rows(stores: Stores, export_id: str) -> int:
    count = sqlalchemy.select(sqlalchemy.func.count()).where(ExportFileRow.export_id == export_id)
    with stores.database.read() as session:
        return session.scalar(count)


def outcome(stores: Stores, export_id: str) -> tuple:
    """All that anybody can ask for."""
    aside = stores.contents.files_aside(export_id, series_uid=None, after=None, limit=99)
    series = {row.series_uid: (row.state, row.files, row.slices) for row in stores.contents.series(export_id)}
    return series, stores.contents.totals(export_id), [(row.name, row.reason) for row in aside]


def test_rows_of_used_files_go_with_their_series_and_nothing_that_is_told_changes(stores, queue, root):
    size = sum(path.stat().st_size for path in root.iterdir())
    told = (
        {ONE.series_uid: ("embedded", 3, 3), TWO.series_uid: ("embedded", 3, 3)},
        (7, size, 6),
        [(b"notes.txt", "not_dicom")],
    )
    first, _ = begin(stores, root)

    assert run(stores, queue, first) == "done"
    assert (rows(stores, first), outcome(stores, first)) == (1, told)
    stores.contents.trim()
    assert (stores.exports.get(first).trimmed, rows(stores, first), outcome(stores, first)) == (True, 1, told)

    put(root, Identity("ENDS-3"), count=1)  # the same root again finds what came since
    again, resumed = begin(stores, root)
    assert (run(stores, queue, again), again != first, resumed) == ("done", True, False)
    series, (files, _, slices), aside = outcome(stores, again)
    assert series == told[0] | {Identity("ENDS-3").series_uid: ("embedded", 1, 1)}
    assert (files, slices, aside, rows(stores, again)) == (8, 7, told[2], 1)
    assert outcome(stores, first) == told


@pytest.mark.parametrize("end", ["dry run", "cancelled", "failed in its scan"])
def test_what_an_export_leaves_that_hands_nothing_over_goes_bit_by_bit(stores, queue, root, monkeypatch, end):
    monkeypatch.setattr("service.storage.contents.TRIMMED_AT_ONCE", 2)
    export_id, _ = begin(stores, root, dry_run=end == "dry run")
    queue.stops = True
    with monkeypatch.context() as patch:
        if end == "failed in its scan":
            patch.setattr(stores.contents, "scanned", queue.embed)
        assert run(stores, queue, export_id) == ("done" if end == "dry run" else "failed")
    if end == "cancelled":
        assert begin(stores, root) == (export_id, True)
        stores.catalog.cancel(stores.exports.get(export_id).job_id)
    before = outcome(stores, export_id)
    assert (rows(stores, export_id), before[1][0]) == (7, 7)

    left = []
    for _ in range(5):
        stores.contents.trim()
        left.append((rows(stores, export_id), stores.exports.get(export_id).trimmed))
        assert outcome(stores, export_id) == before

    assert left == [(5, False), (3, False), (1, False), (1, True), (1, True)]


def test_an_export_that_failed_behind_its_scan_keeps_what_it_needs_to_go_on(stores, queue, root):
    export_id, _ = begin(stores, root)
    queue.stops = True
    assert run(stores, queue, export_id) == "failed"

    for _ in range(3):
        stores.contents.trim()
    assert rows(stores, export_id) == 7
    queue.stops = False

    assert begin(stores, root) == (export_id, True)
    assert run(stores, queue, export_id) == "done"
    assert {state for state, *_ in outcome(stores, export_id)[0].values()} == {"embedded"}
    assert rows(stores, export_id) == 1


def test_an_export_that_an_earlier_version_ended_is_counted_and_trimmed_too(stores, queue, root):
    export_id, _ = begin(stores, root, dry_run=True)
    run(stores, queue, export_id)
    before = outcome(stores, export_id)
    with stores.database.write() as session:
        session.execute(sqlalchemy.update(ExportRow).values(files=None, bytes=None))

    stores.contents.trim()

    assert (rows(stores, export_id), outcome(stores, export_id)) == (1, before)


class Command:
    """`keyslice embed` as a process of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        command = [sys.executable, "-m", "service.cli", "embed", *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            command, env=os.environ | environment | {"PYTHONFAULTHANDLER": "1"}, start_new_session=True, **pipes
        )
        self.progress: list[str] = []

    def until(self, said: str) -> None:
        """Read what it says of its progress until it says this."""
        assert self.process.stderr
        while said not in (line := self.process.stderr.readline()):
            assert line, f"it ended before it said {said!r}: {self.progress}"
            self.progress.append(line)

    def end(self) -> tuple[int, str, str]:
        """Exit status, standard output, and what it said on standard error since."""
        try:
            told, said = self.process.communicate(timeout=CALIBRATED)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # which says where it stands
            pytest.fail("".join(self.process.communicate()))
        return self.process.returncode, told, said

    def interrupt(self) -> tuple[int, str, str]:
        """Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.end()


def undecodable(_: int, dataset: FileDataset) -> None:
    dataset.PixelData = dataset.PixelData[:100]


def test_ctrl_c_stops_a_service_of_the_command_s_own_and_the_same_command_goes_on(tmp_path):
    """Rejected and set aside series are in the table; the rejected one is in the exit status too."""
    many = [Identity(f"CTRL-C-{number:02d}") for number in range(12)]
    for identity in many:
        put(tmp_path / "in", identity, count=2)
    put(tmp_path / "in", Identity("CTRL-C-BROKEN"), change=undecodable)
    put(tmp_path / "in", Identity("CTRL-C-MR"), change=lambda _, dataset: setattr(dataset, "Modality", "MR"))
    own = {"KEYSLICE_DATA_DIR": str(tmp_path / "data"), "KEYSLICE_PORT": "0", "KEYSLICE_EXPORT_SERIES_AHEAD": "1"}

    first = Command(tmp_path / "in", **own)
    first.until(" begins")
    first.until("embed: ")
    family = psutil.Process(first.process.pid).children(recursive=True)
    status, told, said = first.interrupt()

    assert (status, told) == (130, "")
    assert said.splitlines()[-1] == "Interrupted: the export has stopped; the same command goes on where it is."
    assert [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []

    second = Command(
        tmp_path / "in", "--json", "--csv", tmp_path / "table.csv", **own | {"KEYSLICE_EXPORT_SERIES_AHEAD": "8"}
    )
    second.until(" goes on where it was")
    status, told, said = second.end()

    assert status == 3, said
    export = json.loads(told)
    assert export["states"] == {"embedded": 12, "rejected": 1, "set_aside": 1}
    series = {each["series_uid"]: each for each in export["series"]}
    assert {uid: (each["state"], each["slices"], each["set_aside"]) for uid, each in series.items()} == {
        each.series_uid: ("embedded", 2, {}) for each in many
    } | {
        Identity("CTRL-C-BROKEN").series_uid: ("rejected", None, {"undecodable": 3}),
        Identity("CTRL-C-MR").series_uid: ("set_aside", None, {"not_ct": 3}),
    }
    assert all(series[each.series_uid]["seconds"] > 0 for each in many)
    with (tmp_path / "table.csv").open() as file:
        table = {row["series_uid"]: row for row in csv.DictReader(file)}
    assert {uid: (row["state"], row["slices"], row["reasons"]) for uid, row in table.items()} == {
        each.series_uid: ("embedded", "2", "") for each in many
    } | {
        Identity("CTRL-C-BROKEN").series_uid: ("rejected", "", "undecodable:3"),
        Identity("CTRL-C-MR").series_uid: ("set_aside", "", "not_ct:3"),
    }
    assert all(float(table[each.series_uid]["seconds"]) == series[each.series_uid]["seconds"] for each in many)


def test_a_command_that_is_terminated_leaves_no_process_behind(tmp_path):
    for number in range(12):
        put(tmp_path / "in", Identity(f"TERMINATED-{number:02d}"), count=2)
    own = {"KEYSLICE_DATA_DIR": str(tmp_path / "data"), "KEYSLICE_PORT": "0", "KEYSLICE_EXPORT_SERIES_AHEAD": "1"}
    command = Command(tmp_path / "in", **own)
    command.until("embed: ")
    family = psutil.Process(command.process.pid).children(recursive=True)

    command.process.terminate()
    _, left = psutil.wait_procs(family, timeout=20)

    assert len(family) >= 4  # up, broker, worker, API
    assert left == []
    assert command.end()[:2] == (143, "")


def test_ctrl_c_leaves_a_running_service_at_work_and_a_job_counts_what_was_rejected(http, service, export_root):
    many = [Identity(f"LEFT-{number:02d}") for number in range(12)]
    for identity in many:
        put(export_root / "left", identity, count=8)
    put(export_root / "left", Identity("LEFT-BROKEN"), change=undecodable)

    command = Command(export_root / "left", "--service", service.address)
    command.until(" begins")
    status, told, said = command.interrupt()

    assert (status, told) == (130, "")
    going_on = "Interrupted: the service goes on with the export; the same command goes on where it is."
    assert said.splitlines()[-1] == going_on
    page = http.get("/v1/exports", params={"limit": 1000}).json()["exports"]
    (accepted,) = [each for each in page if each["uri"].endswith("/left")]
    job = wait(http, accepted["job_id"])
    export = http.get(f"/v1/exports/{accepted['export_id']}").json()
    assert (job["state"], export["state"]) == ("done", "done")
    assert job["states"] == export["states"] == {"embedded": 12, "rejected": 1}
