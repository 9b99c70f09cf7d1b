"""A disk that fills up: what comes in is refused with 507 and leaves nothing, what waits says why."""

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import missing
from posting import slice_files, tarred
from starlette.testclient import TestClient

from models.ct.phantom import Identity
from service.app import create_app
from service.disk import Room
from service.errors import NoRoom
from service.exports import file_uri
from service.queue import Queue
from service.settings import Settings
from service.storage.stores import Stores, open_stores
from workers.exports import run_export

MORE_THAN_ANY = 2**60  # bytes
MIB = 2**20
DISK = 24 * MIB
LARGE = 32 * MIB

FORM = {"Content-Type": "multipart/form-data; boundary=edge"}
FORM_PART = b'--edge\r\nContent-Disposition: form-data; name="files"; filename="a.dcm"\r\n\r\n'
RELATED = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=edge'}
RELATED_PART = b"--edge\r\nContent-Type: application/dicom\r\n\r\n"
DOORS = pytest.mark.parametrize(
    ("path", "headers", "part"),
    [("/v1/series", FORM, FORM_PART), ("/dicom-web/studies", RELATED, RELATED_PART)],
    ids=["POST /v1/series", "STOW-RS"],
)


@contextmanager
def serving(data_dir: Path, min_free_bytes: int) -> Iterator[TestClient]:
    settings = Settings(
        data_dir=data_dir, broker_url="memory://", sweep_seconds=3600, min_free_bytes=min_free_bytes, max_expansion=1e6
    )
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, with so few bytes that a test can fill it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        missing("this user may not mount a tmpfs; the other tests need none")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def streamed(part: bytes) -> Iterator[bytes]:
    """A body that nobody knows the length of."""
    yield part
    for _ in range(LARGE // MIB):
        yield bytes(MIB)
    yield b"\r\n--edge--\r\n"


def is_refused(answer: httpx.Response, client: TestClient, data_dir: Path) -> None:
    assert (answer.status_code, answer.headers["content-type"]) == (507, "application/problem+json")
    assert answer.json()["type"] == "urn:keyslice:no-room"
    assert [*(data_dir / "staging").glob("*")] == []
    assert [*(data_dir / "archive").glob("*")] == []
    assert client.get("/v1/series").json()["series"] == []


@DOORS
def test_a_body_is_refused_before_it_is_read(tmp_path, path, headers, part):
    read = []

    def body() -> Iterator[bytes]:
        for chunk in streamed(part):
            read.append(chunk)
            yield chunk

    with serving(tmp_path, MORE_THAN_ANY) as client:
        is_refused(client.post(path, headers=headers, content=part + b"x\r\n--edge--\r\n"), client, tmp_path)
        answer = client.post(path, headers=headers, content=body())
        is_refused(answer, client, tmp_path)

    found = answer.json()
    assert found["min_free_bytes"] == MORE_THAN_ANY > found["free_bytes"] > 0


def test_what_the_length_says_counts(tmp_path):
    room = Room(tmp_path, 0)
    room.require(room.left() // 2)

    with pytest.raises(NoRoom, match=r"bytes are free, and .* are to come, expected 0 to stay free"):
        room.require(2 * room.left())


@DOORS
@pytest.mark.parametrize("min_free_bytes", [8 * MIB, 0], ids=["nearly full", "full"])
def test_a_disk_that_fills_up_while_a_body_streams_in(small_disk, path, headers, part, min_free_bytes):
    with serving(small_disk, min_free_bytes) as client:
        answer = client.post(path, headers=headers, content=streamed(part))

        is_refused(answer, client, small_disk)
        small = post(client, slice_files(Identity("AFTER-THE-FLOOD"), count=2))
        assert small.status_code == 202
        assert Room(small_disk, 0).left() >= min_free_bytes


def test_an_archive_that_does_not_fit_unpacked(small_disk):
    archive = tarred([("zeros", bytes(LARGE))], "w:gz")
    with serving(small_disk, 8 * MIB) as client:
        is_refused(post(client, [("zeros.tar.gz", archive)]), client, small_disk)


def post(client: TestClient, files: list[tuple[str, bytes]]) -> httpx.Response:
    return client.post("/v1/series", files=[("files", (name, content)) for name, content in files])


def test_an_export_that_the_disk_has_no_room_for_takes_nothing_in_and_says_why(tmp_path):
    with exporting(tmp_path, MORE_THAN_ANY) as (stores, settings, export_id, _):
        waiting = until(lambda: stores.exports.get(export_id), lambda row: row.error)
        states = stores.contents.states(export_id)

    assert (waiting.state, waiting.error.partition(":")[0]) == ("running", "waiting for room on the disk")
    assert f"expected {MORE_THAN_ANY} to stay free" in waiting.error
    assert states == {"waiting": 1}
    assert [*(settings.data_dir / "archive").glob("*"), *settings.staging_dir.glob("*")] == []


def test_an_export_goes_on_when_there_is_room_again(small_disk, monkeypatch):
    monkeypatch.setattr("workers.exports.ROOM_SECONDS", 0.05)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(8 * MIB))
    with exporting(small_disk, DISK - 6 * MIB) as (stores, _, export_id, uid):
        until(lambda: stores.exports.get(export_id), lambda row: row.error)
        filler.unlink()
        until(lambda: stores.contents.states(export_id), lambda states: states["embedding"])
        going = until(lambda: stores.exports.get(export_id), lambda row: not row.error)
        received = stores.catalog.series(uid).received

    assert (going.state, going.attempts, received) == ("running", 0, 3)


@contextmanager
def exporting(root: Path, min_free_bytes: int) -> Iterator[tuple[Stores, Settings, str, str]]:
    """A directory with one series, in the hands of a worker that embeds nothing and hands it back at the end."""
    identity, folder, stopping = Identity("WAITS-FOR-ROOM"), root / "export", threading.Event()
    folder.mkdir()
    for name, content in slice_files(identity, count=3):
        (folder / name).write_bytes(content)
    settings = Settings(data_dir=root / "data", broker_url="memory://", min_free_bytes=min_free_bytes)
    stores = open_stores(settings)
    export, _ = stores.exports.add(file_uri(bytes(folder)), "toy@0", {"dry_run": False})
    arguments = (export.export_id, stores, settings, Queue(settings, stores), stopping)
    thread = threading.Thread(target=run_export, args=arguments)
    thread.start()
    try:
        yield stores, settings, export.export_id, identity.series_uid
    finally:
        stopping.set()
        thread.join()
        stores.close()


def until(ask: Callable[[], Any], true: Callable[[Any], object], seconds: float = 60.0) -> Any:
    """The first answer that is so."""
    end = time.monotonic() + seconds
    while not true(answer := ask()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return answer
