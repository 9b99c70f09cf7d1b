"""Log lines as JSON, of a real service: with the ids of request, task and series, and nobody's name."""

import json
import logging
import re
import time
from pathlib import Path

import httpx
import pytest
from posting import embed, slice_files
from starlette.testclient import TestClient

from models.ct.phantom import Identity
from service import logs
from service.app import create_app
from service.embedded import in_background
from service.settings import Settings

NAME = "LOGGED-7731"


def lines(folder: Path) -> list[dict]:
    """All but those of Valkey, which has a way of its own, and Celery's last words when it is told to stop."""
    written = (folder / "keyslice.log").read_text().replace("\nworker: Warm shutdown (MainProcess)\n", "")
    return [json.loads(line) for line in written.splitlines() if not re.match(r"\d+:([A-Z]|signal-handler) ", line)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """What a service wrote that took a series in, answered, refused, and stopped; and that series' UID."""
    folder = tmp_path_factory.mktemp("logged")
    uid = Identity(NAME).series_uid
    with (
        in_background(folder, KEYSLICE_LOG_FORMAT="json", KEYSLICE_CANARY_SECONDS="2") as running,
        httpx.Client(base_url=running.address, timeout=60) as http,
    ):
        embed(http, slice_files(Identity(NAME), count=3))
        assert http.get(f"/v1/series/{uid}", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
        assert http.get(f"/v1/patients/{NAME}/predictions", params={"head": "none"}).status_code == 404
        assert http.get(f"/v1/series/{NAME}").status_code == 404
        assert http.get(f"/v1/{NAME}").status_code == 404
        end = time.monotonic() + 60
        while not any(line["logger"] == "workers.pipeline" for line in lines(folder)):
            assert time.monotonic() < end
            time.sleep(0.2)
    return lines(folder), uid


def test_every_line_is_an_object_with_time_level_and_logger(written):
    found, _ = written

    assert len(found) > 10
    assert all({"time", "level", "logger", "message"} <= set(line) for line in found)
    assert {line["logger"].partition(".")[0] for line in found} >= {"service", "workers", "celery"}


def test_a_request_has_an_id_a_route_and_what_it_was_about(written):
    found, uid = written

    (line,) = [line for line in found if line.get("request_id") == "mine-1"]
    assert (line["route"], line["status"], line["series_uid"]) == ("/v1/series/{series_uid}", 200, uid)
    assert line["ms"] > 0
    others = {line["request_id"] for line in found if "request_id" in line} - {"mine-1"}
    assert len(others) > 4


def test_a_task_names_itself(written):
    found, _ = written

    canaries = [line for line in found if line["message"].startswith("canary of")]
    assert canaries and all(line["task"].endswith("canary") and line["task_id"] for line in canaries)


def test_nobody_is_named_not_even_by_who_asks_for_what_is_not_here(written):
    found, _ = written

    assert NAME not in json.dumps(found)
    assert [line["status"] for line in found if line.get("route") == "/v1/patients/{patient_id}/predictions"] == [404]


@pytest.mark.parametrize("sent", ["", "a b", "x" * 65, "a\tb", "{}", "a\n", "a\r\nb: c"])
def test_a_request_id_that_could_forge_a_line_is_replaced(tmp_path, sent):
    app = create_app(Settings(data_dir=tmp_path, broker_url="memory://"))
    with TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as http:
        answered = http.get("/healthz", headers={"X-Request-ID": sent}).headers["x-request-id"]

    assert len(answered) == 32
    assert answered != sent


def test_what_lines_are_about_ends_with_the_block(caplog):
    record = logging.LogRecord("service", logging.INFO, "", 0, "said", (), None)
    with logs.about(request_id="1"), logs.about(head_id="2"):
        logs._with_ids(record)
    after = logging.LogRecord("service", logging.INFO, "", 0, "said", (), None)
    logs._with_ids(after)

    assert (record.request_id, record.head_id) == ("1", "2")
    assert not hasattr(after, "request_id")
