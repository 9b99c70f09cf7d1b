"""Death between any two lines: nothing lost, nothing twice, nothing half-visible."""

import io
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from posting import embed, post, slice_files, wait

from models.ct.phantom import Identity
from service.embedded import STOP_SECONDS, Running, in_background

LONG = 500  # slices: some seconds of work


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def service(folder):
    """A service of this module's own, whose parts are killed."""
    quick = {"KEYSLICE_SWEEP_SECONDS": "0.5", "KEYSLICE_STALE_SECONDS": "4"}
    exports = {"ROOTS": str(folder / "exports"), "SERIES_AHEAD": "1"}  # one after the other, to be caught among them
    quick |= {"KEYSLICE_SCAN_PROCESSES": "1"} | {f"KEYSLICE_EXPORT_{name}": value for name, value in exports.items()}
    with in_background(folder, **quick) as running:
        yield running


@pytest.fixture(scope="module")
def http(service):
    with httpx.Client(base_url=service.address, timeout=60) as client:
        yield client


def child(service: Running, name: str) -> psutil.Process:
    children = psutil.Process(service.process.pid).children()
    return next(each for each in children if any(name in part for part in each.cmdline()))


def kill(service: Running, *names: str) -> None:
    """kill -9 of the parts and of everything below them."""
    for part in [child(service, name) for name in names]:
        os.killpg(part.pid, signal.SIGKILL)


def wait_until_under_way(http: httpx.Client, job: str) -> None:
    while (done := http.get(f"/v1/jobs/{job}").json()["done"]) == 0:
        time.sleep(0.02)
    assert done < LONG, "the series was too short to be caught in the middle"


def bag(http: httpx.Client, identity: Identity) -> np.ndarray:
    path = f"/v1/series/{identity.series_uid}/embeddings"
    return np.load(io.BytesIO(http.get(path, headers={"Accept": "application/x-npy"}).raise_for_status().content))


def rows(http: httpx.Client, identity: Identity) -> list[tuple[int, str]]:
    """What the index holds of the series."""
    query = {"series_uid": identity.series_uid, "slice": 0, "window": "lung", "k": 1000}
    found = []
    for window in ("abdomen", "lung"):
        body = {**query, "window": window, "filters": {"series_uid": identity.series_uid}}
        found += [(hit["slice"], hit["window"]) for hit in http.post("/v1/search", json=body).json()["hits"]]
    return sorted(found)


def once_it_is_back(http: httpx.Client, method: str, path: str, **content: Any) -> httpx.Response:
    end = time.monotonic() + 60
    while True:
        try:
            return http.request(method, path, **content)
        except httpx.TransportError:
            assert time.monotonic() < end, "the API did not come back"
            time.sleep(0.1)


def stored(folder: Path, query: str) -> list[tuple[Any, ...]]:
    """What the catalog has, asked without anybody's help."""
    with closing(sqlite3.connect(folder / "catalog.db")) as connection:
        return connection.execute(query).fetchall()


def test_a_worker_killed_in_the_middle_of_a_series_loses_nothing(http, service, folder):
    undisturbed, disturbed = Identity("CALM"), Identity("KILLED")
    embed(http, slice_files(undisturbed, count=LONG, seed=1))

    job = post(http, slice_files(disturbed, count=LONG, seed=1)).json()["job_id"]
    wait_until_under_way(http, job)
    assert http.get(f"/v1/series/{disturbed.series_uid}/embeddings").status_code == 409
    kill(service, "celery")

    assert wait(http, job)["state"] == "done"
    assert np.array_equal(bag(http, disturbed), bag(http, undisturbed))
    assert rows(http, disturbed) == [(k, window) for k in range(LONG) for window in ("abdomen", "lung")]
    (encoder,) = (folder / "bags").iterdir()
    assert len(list((encoder / disturbed.series_uid).iterdir())) == 1


def test_a_broker_that_forgets_everything_is_asked_again(http, service, folder):
    identities = [Identity(f"FORGOTTEN-{number}") for number in range(4)]
    jobs = [post(http, slice_files(identity, count=20)).json()["job_id"] for identity in identities]

    broker = child(service, "valkey-server")
    broker.kill()
    for path in (folder / "broker").rglob("*"):
        if path.is_file():
            path.unlink()

    assert [wait(http, job)["state"] for job in jobs] == ["done"] * 4
    assert [len(bag(http, identity)) for identity in identities] == [20] * 4


def test_an_api_that_dies_comes_back_with_everything(http, service):
    embed(http, slice_files(Identity("BEFORE"), count=2))
    kill(service, "uvicorn")

    answer = once_it_is_back(http, "GET", f"/v1/series/{Identity('BEFORE').series_uid}")

    assert answer.json()["state"] == "indexed"


def test_an_export_whose_worker_and_api_are_killed_in_its_scan_and_among_its_series_embeds_each_once(
    http, service, folder
):
    root, headers = folder / "exports" / "killed", 6000
    many = [Identity(f"EXPORTED-{number}") for number in range(6)]
    files = [content for identity in many for _, content in slice_files(identity, count=4)]
    ((_, other),) = slice_files(Identity("MR"), count=1, change=lambda _, dataset: setattr(dataset, "Modality", "MR"))
    root.mkdir(parents=True)
    for number, content in enumerate([*files, other]):
        (root / str(number)).write_bytes(content)
    for number in range(1, headers):
        (root / f"MR-{number}").hardlink_to(root / str(len(files)))
    exported = (
        "SELECT series_uid, embedded_at FROM embeddings JOIN export_series USING (series_uid) WHERE content <> ''"
    )

    def ask() -> dict[str, Any]:
        return once_it_is_back(http, "POST", "/v1/exports", json={"uri": str(root)}).json()

    def kill_where(what: str, reached: Callable[[dict[str, Any]], bool]) -> None:
        while not reached(export := http.get(path).json()):
            assert export["state"] in ("received", "queued", "running"), (
                f"the export was too short to be caught in {what}"
            )
            time.sleep(0.02)
        kill(service, "celery", "uvicorn")

    first = ask()
    path = f"/v1/exports/{first['export_id']}"
    kill_where("its scan", lambda export: export["files"] > 0)
    assert stored(folder, "SELECT scanned_at FROM exports") == [(None,)]
    ((noted,),) = stored(folder, "SELECT count(*) FROM export_files")
    second = ask()
    kill_where("its series", lambda export: export["states"].get("embedded", 0) > 1)
    before = dict(stored(folder, exported))
    third = ask()
    job = wait(http, third["job_id"])

    export, after = http.get(path).json(), dict(stored(folder, exported))
    assert 0 < noted < len(files) + headers
    assert 1 < len(before) < len(many) and before.items() <= after.items()  # none of these was embedded again
    assert [(each["export_id"], each["resumed"]) for each in (second, third)] == [(first["export_id"], True)] * 2
    assert (job["state"], job["done"], job["states"]) == ("done", 7, {"embedded": 6, "set_aside": 1})
    assert (export["files"], export["slices"], export["set_aside"]) == (len(files) + headers, 24, {"not_ct": headers})
    assert stored(folder, "SELECT DISTINCT reason FROM export_files") == [("not_ct",)]
    assert list((folder / "staging").glob("export-*")) == []
    (encoder,) = (folder / "bags").iterdir()
    for identity in many:
        while http.get(f"/v1/series/{identity.series_uid}").json()["state"] != "indexed":
            time.sleep(0.1)
        assert (len(bag(http, identity)), len(list((encoder / identity.series_uid).iterdir()))) == (4, 1)
        assert rows(http, identity) == [(k, window) for k in range(4) for window in ("abdomen", "lung")]


def test_a_decoder_that_dies_takes_no_series_with_it(http, service):
    identity = Identity("DECODER")
    job = post(http, slice_files(identity, count=LONG)).json()["job_id"]
    wait_until_under_way(http, job)

    for decoder in child(service, "celery").children():
        if "spawn_main" in " ".join(decoder.cmdline()):
            decoder.kill()

    assert wait(http, job)["state"] == "done"
    assert len(bag(http, identity)) == LONG


def test_the_same_series_from_eight_callers_at_once_is_stored_once(http):
    identity = Identity("EIGHT")
    files = slice_files(identity, count=12)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(post(http, files))) for _ in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [answer.status_code for answer in answers] == [202] * 8
    for answer in answers:
        assert wait(http, answer.json()["job_id"])["state"] == "done"
    assert sum(answer.json()["series"][0]["received"] for answer in answers) == 12
    assert len(bag(http, identity)) == 12
    assert rows(http, identity) == [(k, window) for k in range(12) for window in ("abdomen", "lung")]


def test_a_second_service_on_the_same_data_is_refused(service, folder):
    from service.embedded import CannotStart

    with pytest.raises(CannotStart), in_background(folder):
        pass

    assert "another keyslice is up" in (folder / "keyslice.log").read_text()


def test_a_service_that_is_stopped_in_the_middle_of_a_series_hands_it_back_and_embeds_it_once_when_it_is_back(tmp_path):
    identity, quick = Identity("STOPPED"), {"KEYSLICE_SWEEP_SECONDS": "0.5", "KEYSLICE_STALE_SECONDS": "4"}
    with in_background(tmp_path, **quick) as running, httpx.Client(base_url=running.address, timeout=60) as http:
        job = post(http, slice_files(identity, count=LONG)).json()["job_id"]
        wait_until_under_way(http, job)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(STOP_SECONDS) == 0
    handed_back = stored(tmp_path, "SELECT state, holder, attempts, content FROM embeddings")
    log = (tmp_path / "keyslice.log").read_text()

    with in_background(tmp_path, **quick) as running, httpx.Client(base_url=running.address, timeout=60) as http:
        assert wait(http, job)["state"] == "done"
        assert http.get(f"/v1/series/{identity.series_uid}").json()["verdict"]["set_aside"] == []
        assert len(bag(http, identity)) == LONG
        assert rows(http, identity) == [(k, window) for k in range(LONG) for window in ("abdomen", "lung")]

    assert handed_back == [("queued", None, 0, None)]
    assert "killing it" not in log
    assert len(list(tmp_path.glob(f"bags/*/{identity.series_uid}/*"))) == 1
    assert stored(tmp_path, "SELECT state, attempts FROM embeddings") == [("indexed", 0)]


def test_stopping_leaves_no_process_behind(tmp_path):
    with in_background(tmp_path) as running:
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert len(family) >= 3

    assert [each for each in family if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []
