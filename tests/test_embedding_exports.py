"""Exports: what may be named, what becomes of every series, and what a death in the middle costs."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path

import pytest
from archived import archived
from posting import slice_files, tarred
from starlette.testclient import TestClient

from models.ct.phantom import Identity
from service.app import create_app
from service.errors import BadExport
from service.exports import checked_uri, file_uri, path_of
from service.queue import Queue
from service.settings import Settings
from service.storage.contents import NotHeld
from service.storage.files import ExportFile
from service.storage.stores import Stores, open_stores
from workers import exports as runs
from workers.background import Background
from workers.exports import run_export, see_to_export

ENCODER = "toy@0"


def put(folder: Path, identity: Identity, count: int = 4, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in slice_files(identity, count=count, **options):
        (folder / f"{identity.patient_id}-{name}").write_bytes(content)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two series in one folder, one of them in another one too, with its last slice twice, and a note beside them."""
    folder = tmp_path / "export"
    put(folder / "mixed", Identity("MIXED-1"), count=3)
    put(folder / "mixed", Identity("MIXED-2"), count=5)
    (folder / "other").mkdir()
    (folder / "mixed" / "MIXED-2-4.dcm").rename(folder / "other" / os.fsdecode(b"\xff"))
    (folder / "other" / "again").write_bytes((folder / "mixed" / "MIXED-2-3.dcm").read_bytes())
    (folder / "notes.txt").write_text("MIXED-1 is a patient")
    return folder


@pytest.fixture
def settings(tmp_path: Path, root: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", broker_url="memory://", sweep_seconds=1e6, export_roots=str(root))


@pytest.fixture
def own(settings: Settings):
    """Stores on SQLite, for what concerns no database."""
    opened = open_stores(settings)
    yield opened
    opened.close()


@pytest.fixture
def embedder():
    """Where a worker's other threads would embed: starts one that commits an embedding of whatever waits."""
    over, threads = threading.Event(), []

    def start(stores: Stores, spoil: str = "") -> None:
        def embed() -> None:
            while not over.wait(0.02):
                for key in stores.catalog.lost(0, queue_is_empty=True):
                    content, slices = stores.archive.content(key.series_uid)
                    if stores.catalog.claim(key, "embedder", 15, 3) and key.series_uid == spoil:
                        stores.catalog.fail(key, "failed", "it was spoiled")
                    else:
                        stores.catalog.commit(key, content, slices, VERDICT, {})

        threads.append(threading.Thread(target=embed))
        threads[-1].start()

    yield start
    over.set()
    for thread in threads:
        thread.join()


VERDICT = {"status": "accepted", "findings": [], "set_aside": [{"reason": "undecodable"}]}


def begin(stores: Stores, folder: Path, **options) -> str:
    row, _ = stores.exports.add(file_uri(os.fsencode(folder)), ENCODER, {"dry_run": False} | options)
    return row.export_id


def started(stores: Stores, settings: Settings, export_id: str) -> tuple[Background, threading.Event]:
    """An export in a thread, and what tells it to end."""
    threads, stopping = Background("export", 1), threading.Event()
    threads.start(export_id, partial(see_to_export, export_id, stores, settings, stopping))
    return threads, stopping


def run(stores: Stores, settings: Settings, export_id: str) -> dict[str, tuple]:
    """The export at its end: state, files and slices of every series."""
    run_export(export_id, stores, settings, Queue(settings, stores))
    rows = stores.contents.series(export_id)
    return {row.series_uid: (row.state, row.files, row.slices) for row in rows}


def aside(stores: Stores, export_id: str) -> dict[bytes, str]:
    rows = stores.contents.files_aside(export_id, series_uid=None, after=None, limit=100)
    return {row.name: row.reason for row in rows}


BOTH = {
    Identity("MIXED-1").series_uid: ("embedded", 3, 3),
    Identity("MIXED-2").series_uid: ("embedded", 6, 5),
}


def test_every_series_is_embedded_whole_wherever_its_files_lie(stores, settings, root, embedder):
    embedder(stores)
    export_id = begin(stores, root)

    assert run(stores, settings, export_id) == BOTH
    row = stores.exports.get(export_id)
    assert (row.state, row.done, row.known, row.error) == ("done", 2, 2, None)
    assert row.created_at <= row.scanned_at <= row.ended_at
    assert stores.contents.totals(export_id)[::2] == (10, 8)
    assert aside(stores, export_id) == {b"notes.txt": "not_dicom"}
    assert all(row.slices_set_aside == {"undecodable": 1} for row in stores.contents.series(export_id))
    assert stores.exports.add(row.uri, ENCODER, {"dry_run": False})[1] is False
    noted = [json.loads(row.entry) for row in stores.audit.list(who=f"export:{export_id}")]
    assert [(each["kind"], each["series"]) for each in noted] == [
        ("export.series", [stores.catalog.series(uid).series_key]) for uid in sorted(BOTH)
    ]


def test_our_archive_is_a_copy(own, settings, root, embedder):
    embedder(own)
    run(own, settings, begin(own, root))
    before = {path: path.read_bytes() for path in archived(own, Identity("MIXED-1").series_uid)}

    for path in root.rglob("MIXED-1-*"):
        with path.open("r+b") as file:
            file.write(bytes(1000))

    assert {path: path.read_bytes() for path in before} == before
    assert len(before) == 3


def test_a_series_that_fails_is_told_and_the_rest_goes_on(own, settings, root, embedder):
    first = Identity("MIXED-1").series_uid
    embedder(own, spoil=first)
    export_id = begin(own, root)

    assert run(own, settings, export_id) == BOTH | {first: ("failed", 3, None)}
    assert own.exports.get(export_id).state == "done"
    assert own.contents.series(export_id)[0].error or own.contents.series(export_id)[1].error


def test_what_changed_or_vanished_since_the_scan_is_named(own, settings, root, embedder, monkeypatch):
    """The scan is over and nothing is copied yet: that is when the files change."""
    embedder(own)
    export_id = begin(own, root)
    scanned = own.contents.scanned

    def disturb(*arguments, **options):
        scanned(*arguments, **options)
        (root / "mixed" / "MIXED-1-0.dcm").unlink()
        (root / "mixed" / "MIXED-1-1.dcm").write_bytes((root / "mixed" / "MIXED-2-0.dcm").read_bytes())
        (root / "mixed" / "MIXED-2-1.dcm").write_text("no DICOM any more")

    monkeypatch.setattr(own.contents, "scanned", disturb)

    assert run(own, settings, export_id) == {
        Identity("MIXED-1").series_uid: ("embedded", 3, 1),
        Identity("MIXED-2").series_uid: ("embedded", 6, 4),
    }
    assert aside(own, export_id) == {
        b"notes.txt": "not_dicom",
        b"mixed/MIXED-1-0.dcm": "vanished",
        b"mixed/MIXED-1-1.dcm": "changed",
        b"mixed/MIXED-2-1.dcm": "not_dicom",
    }


def test_a_series_without_a_usable_slice_is_set_aside_with_the_reasons(own, settings, tmp_path, embedder):
    def localizer(_, dataset):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    def magnetic(_, dataset):
        dataset.Modality = "MR"

    put(tmp_path / "in", Identity("SCOUT"), count=2, change=localizer)
    put(tmp_path / "in", Identity("MR"), count=3, change=magnetic)
    export_id = begin(own, tmp_path / "in")

    assert run(own, settings, export_id) == {
        Identity("SCOUT").series_uid: ("set_aside", 2, None),
        Identity("MR").series_uid: ("set_aside", 3, None),
    }
    assert own.contents.all_reasons(export_id) == {"localizer": 2, "not_ct": 3}
    assert own.exports.get(export_id).done == 2


def test_an_empty_directory_is_an_export_of_nothing(own, settings, tmp_path):
    (tmp_path / "in").mkdir()
    export_id = begin(own, tmp_path / "in")

    assert run(own, settings, export_id) == {}
    assert own.exports.get(export_id).state == "done"


def test_a_dry_run_embeds_nothing(own, settings, root):
    export_id = begin(own, root, dry_run=True)

    assert [state for state, *_ in run(own, settings, export_id).values()] == ["found"] * 2
    assert archived(own, Identity("MIXED-1").series_uid) == []


def test_an_archive_that_breaks_in_the_middle_fails_and_says_so(own, settings, tmp_path):
    files = slice_files(Identity("BROKEN"), count=4)
    path = tmp_path / "export.tar"
    path.write_bytes(tarred(files)[:9000])
    export_id = begin(own, path)

    assert run(own, settings, export_id) == {}
    assert own.exports.get(export_id).state == "failed"
    assert "broken or truncated" in own.exports.get(export_id).error


def test_a_zip_is_embedded_as_the_directory_is(own, settings, tmp_path, root, embedder):
    embedder(own)
    with zipfile.ZipFile(tmp_path / "export.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, path in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
            archive.writestr(f"{number}", path.read_bytes())

    assert run(own, settings, begin(own, tmp_path / "export.zip")) == BOTH


@pytest.mark.parametrize("lines", [1, 2, 3, 4, 5])
def test_a_death_between_any_two_steps_loses_nothing(lines, own, settings, root, embedder, monkeypatch):
    """The first worker ends where the `lines`-th step begins, without a word; another goes on."""
    steps = [
        (own.contents, "record"),
        (own.contents, "scanned"),
        (own.catalog, "collect"),
        (own.contents, "handed_over"),
        (own.contents, "settle"),
    ]
    place, name = steps[lines - 1]

    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    export_id = begin(own, root)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, die)
        run(own, settings, export_id)
    assert own.exports.get(export_id).state == "running"
    assert own.exports.lost(0, queue_is_empty=False) == [export_id]
    embedder(own)

    assert run(own, settings, export_id) == BOTH
    assert own.exports.get(export_id).done == 2
    assert aside(own, export_id) == {b"notes.txt": "not_dicom"}


def test_an_erasure_takes_the_names_of_an_export_along(own, settings, tmp_path, embedder):
    gone, stays = Identity("GONE-7"), Identity("STAYS-7")
    put(tmp_path / "GONE-7", gone)
    put(tmp_path / "GONE-7", stays)
    (tmp_path / "GONE-7" / "GONE-7.txt").write_text("a note")
    embedder(own)
    export_id, found = begin(own, tmp_path / "GONE-7"), begin(own, tmp_path / "GONE-7", dry_run=True)
    run(own, settings, export_id)
    run(own, settings, found)

    own.erasures.begin(patient_id="GONE-7")

    assert own.exports.get(export_id).uri == "erased:"
    assert aside(own, export_id) == {}
    assert [row.series_uid for row in own.contents.series(export_id)] == [stays.series_uid]
    assert own.contents.usable_files(found, gone.series_uid) == []
    assert len(own.contents.usable_files(found, stays.series_uid)) == 4


def test_a_worker_that_lost_its_export_writes_nothing_more(own):
    export_id = begin(own, Path("/nowhere"))
    assert own.exports.claim(export_id, "first", 15, 3)
    assert not own.exports.claim(export_id, "second", 15, 3)
    assert own.exports.claim(export_id, "second", 0, 3)

    with pytest.raises(NotHeld):
        own.contents.record(export_id, "first", [ExportFile(b"x", 1)])
    own.exports.finish(export_id, "first")
    own.exports.release(export_id, "first")

    assert own.exports.get(export_id).state == "running"
    assert own.contents.totals(export_id)[0] == 0


def test_an_export_that_kills_every_worker_is_given_up(own):
    export_id = begin(own, Path("/nowhere"))

    claims = [own.exports.claim(export_id, f"worker {number}", 0, 3) for number in range(4)]

    assert claims == [True, True, True, False]
    assert own.exports.get(export_id).error == "given up after 3 attempts: the worker died"


def test_a_name_given_twice_by_a_changing_folder_is_recorded_once(own):
    export_id = begin(own, Path("/nowhere"))
    own.exports.claim(export_id, "me", 15, 3)
    own.contents.record(export_id, "me", [ExportFile(b"a", 1)])

    own.contents.record(export_id, "me", [ExportFile(b"a", 1), ExportFile(b"b", 1), ExportFile(b"b", 1)])

    assert own.contents.totals(export_id)[0] == 2
    assert own.exports.get(export_id).done == 2


def test_cancelling_ends_an_export_that_waits_for_its_series(own, settings, root):
    export_id = begin(own, root)
    threads, _ = started(own, settings, export_id)
    while own.contents.states(export_id)["embedding"] < 2:
        time.sleep(0.02)

    own.catalog.cancel(own.exports.get(export_id).job_id)
    threads.close(10)

    assert own.exports.get(export_id).state == "cancelled"
    assert own.contents.states(export_id) == {"cancelled": 2}
    assert own.catalog.series(Identity("MIXED-1").series_uid).state in ("received", "queued")


def test_a_worker_that_ends_hands_its_export_back(own, settings, root, embedder):
    export_id = begin(own, root)
    threads, stopping = started(own, settings, export_id)
    while own.contents.states(export_id)["embedding"] < 2:
        time.sleep(0.02)

    stopping.set()
    threads.close(10)

    row = own.exports.get(export_id)
    assert (row.state, row.holder, row.attempts) == ("received", None, 0)
    embedder(own)
    assert run(own, settings, export_id) == BOTH


def test_a_bounded_number_of_series_waits_for_the_encoder(own, settings, tmp_path):
    for number in range(4):
        put(tmp_path / "in", Identity(f"AHEAD-{number}"), count=1)
    settings = settings.model_copy(update={"export_series_ahead": 2})
    export_id = begin(own, tmp_path / "in")
    threads, stopping = started(own, settings, export_id)
    while own.contents.states(export_id)["embedding"] < 2:
        time.sleep(0.02)
    time.sleep(2 * runs.POLL_SECONDS)

    assert own.contents.states(export_id) == {"embedding": 2, "waiting": 2}
    stopping.set()
    threads.close(10)


class TestHttp:
    @pytest.fixture
    def http(self, settings):
        with TestClient(create_app(settings)) as client:
            yield client

    def refused(self, http, uri: str) -> tuple[int, str, str]:
        answer = http.post("/v1/exports", json={"uri": uri})
        problem = answer.json()
        return answer.status_code, problem["type"], problem["detail"]

    def test_without_roots_no_path_may_be_named(self, tmp_path, root):
        settings = Settings(data_dir=tmp_path / "other", broker_url="memory://", sweep_seconds=1e6)
        with TestClient(create_app(settings)) as http:
            status, kind, detail = self.refused(http, str(root))

        assert (status, kind) == (403, "urn:keyslice:path-not-allowed")
        assert "KEYSLICE_EXPORT_ROOTS" in detail

    def test_a_path_outside_the_roots_is_refused_whatever_leads_there(self, http, root, tmp_path):
        (tmp_path / "export-secret").mkdir()
        (root / "out").symlink_to(tmp_path / "export-secret")

        for path in ("/etc", "/nowhere/at/all", f"{root}/../export-secret", f"{root}-secret", f"{root}/out", "/"):
            status, kind, detail = self.refused(http, path)
            assert (status, kind) == (403, "urn:keyslice:path-not-allowed"), path
            assert path not in detail
        assert self.refused(http, f"file://{root}/%2e%2e/export-secret")[0] == 403

    def test_what_is_no_export_is_refused_with_what_was_expected(self, http, root):
        (root / "cut.zip").write_bytes(b"PK\x03\x04" + bytes(100))
        (root / "cut.tgz").write_bytes(b"\x1f\x8b\x08" + bytes(100))
        expected = {
            f"{root}/missing": "expected a directory or an archive",
            f"{root}/notes.txt": "neither a zip nor a tar",
            f"{root}/cut.zip": "broken or truncated",
            f"{root}/cut.tgz": "broken or truncated",
            "ftp://pacs/export": "ftp, expected",
            "export": "no scheme, expected",
            f"file://elsewhere{root}": "file:///path",
            "file:///%00": "no absolute path",
        }
        for uri, said in expected.items():
            status, _, detail = self.refused(http, uri)
            assert (status, said in detail) == (422, True), (uri, detail)
        assert http.post("/v1/exports", json={"uri": str(root), "everything": True}).status_code == 422

    def test_the_same_export_again_goes_on_until_it_has_ended(self, http, root):
        first, again = (http.post("/v1/exports", json={"uri": str(root)}) for _ in range(2))
        other = http.post("/v1/exports", json={"uri": str(root), "dry_run": True}).json()
        job = http.post(f"/v1/jobs/{first.json()['job_id']}/cancel").json()
        anew = http.post("/v1/exports", json={"uri": str(root)}).json()

        assert (first.status_code, first.json()["resumed"], again.json()["resumed"]) == (202, False, True)
        assert first.json()["export_id"] == again.json()["export_id"]
        assert len({each["export_id"] for each in (first.json(), other, anew)}) == 3
        assert (job["kind"], job["state"], job["unit"]) == ("export", "cancelled", "files")
        page = http.get("/v1/exports", params={"limit": 2}).json()
        rest = http.get("/v1/exports", params={"cursor": page["next_cursor"]}).json()
        assert len(page["exports"] + rest["exports"]) == 3
        assert rest["next_cursor"] is None
        assert http.get("/v1/exports/none").status_code == 404

    def test_a_table_and_its_pages_say_the_same(self, http, settings, own, root, embedder):
        embedder(own)
        export_id = begin(own, root)
        run(own, settings, export_id)
        path = f"/v1/exports/{export_id}"

        export = http.get(path, params={"limit": 1}).json()
        following = http.get(path, params={"cursor": export["next_cursor"]}).json()
        series = export.pop("series") + following.pop("series")
        lines = http.get(path, headers={"Accept": "text/csv"}).text
        files = http.get(f"{path}/files").json()["files"]

        assert (export["files"], export["slices"], export["states"]) == (10, 8, {"embedded": 2})
        assert export["set_aside"] == {"not_dicom": 1}
        assert [(each["series_uid"], each["set_aside"]) for each in series] == [
            (uid, {"undecodable": 1}) for uid in sorted(BOTH)
        ]
        assert lines == http.get(f"{path}/table.csv").text
        assert [(row["series_uid"], row["reasons"]) for row in csv.DictReader(io.StringIO(lines))] == [
            (uid, "undecodable:1") for uid in sorted(BOTH)
        ]
        assert [(each["file"], each["reason"]) for each in files] == [("notes.txt", "not_dicom")]


def test_uris_hold_whatever_bytes_a_path_has(tmp_path):
    odd = os.fsencode(tmp_path) + b"/a,b %\xff"
    Path(os.fsdecode(odd)).mkdir()

    assert path_of(file_uri(odd)) == odd
    assert checked_uri(file_uri(odd), f"/nowhere, {file_uri(odd)}") == file_uri(odd)
    with pytest.raises(BadExport):
        path_of("relative")


def keyslice(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service.cli", "embed", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=os.environ | environment, start_new_session=True, **pipes)


def test_the_command_embeds_by_the_running_service(http, service, export_root, tmp_path):
    one, other = Identity("EXPORT-HTTP-1"), Identity("EXPORT-HTTP-2")
    put(export_root / "first", one)
    put(export_root / "first", other)
    (export_root / "first" / "PATIENT^NAME.txt").write_text("nothing")

    command = keyslice(export_root / "first", "--json", "--csv", tmp_path / "table.csv", "--service", service.address)
    told, progress = command.communicate(timeout=100)

    assert command.returncode == 0, progress
    export = json.loads(told)
    assert {each["series_uid"]: (each["state"], each["slices"]) for each in export["series"]} == {
        one.series_uid: ("embedded", 4),
        other.series_uid: ("embedded", 4),
    }
    assert (export["set_aside"], export["state"]) == ({"not_dicom": 1}, "done")
    job = http.get(f"/v1/jobs/{export['job_id']}").json()
    assert (job["kind"], job["done"], job["known"], job["unit"]) == ("export", 2, 2, "series")
    assert "event: job" in http.get(f"/v1/jobs/{export['job_id']}/events").text
    with (tmp_path / "table.csv").open() as table:
        assert {row["series_uid"] for row in csv.DictReader(table)} == {one.series_uid, other.series_uid}
    assert "embed: 2 of 2 series" in progress
    assert http.get(f"/v1/series/{one.series_uid}/embeddings").status_code == 200


def test_the_command_says_why_the_service_may_not_read_a_path(service, tmp_path):
    command = keyslice(tmp_path, "--service", service.address)

    _, said = command.communicate(timeout=60)

    assert command.returncode == 1
    assert "KEYSLICE_EXPORT_ROOTS" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["/nowhere/at/all"], "no such file or directory"),
        (["ftp://pacs/export"], "no exports from ftp"),
        (["/", "--csv", "/nowhere/at/all"], "expected a file in a directory"),
    ],
)
def test_a_command_that_is_wrong_exits_with_2(arguments, said):
    command = keyslice(*arguments)

    assert said in command.communicate(timeout=60)[1].replace("\n", " ")
    assert command.returncode == 2
