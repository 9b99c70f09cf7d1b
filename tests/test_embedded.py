"""The service as it is started, whole or in parts, and what a shell asks of it."""

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from posting import embed, slice_files
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service.cli import app
from service.embedded import free_port

IDLE_SECONDS = 6.0  # longer than uvicorn keeps a connection unless told


def test_an_idle_connection_still_answers(service):
    connection = http.client.HTTPConnection(urlsplit(service.address).netloc, timeout=30)
    connection.connect()
    used = connection.sock

    for idle in (0.0, IDLE_SECONDS):
        time.sleep(idle)
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()

    assert connection.sock is used
    connection.close()


def alone(command: str, folder: Path, **variables: str) -> subprocess.Popen[str]:
    own = {"KEYSLICE_DATA_DIR": str(folder), "KEYSLICE_BROKER_URL": "memory://"} | variables
    arguments = [sys.executable, "-m", "service.cli", command]
    return subprocess.Popen(arguments, env=os.environ | own, stderr=subprocess.PIPE, text=True)


def test_serve_is_the_api_alone(tmp_path):
    port = free_port("127.0.0.1", 0)
    process = alone("serve", tmp_path, KEYSLICE_PORT=str(port))
    try:
        end = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(30) in (0, -signal.SIGTERM)


def test_work_is_a_worker_alone(tmp_path):
    process = alone("work", tmp_path)
    try:
        assert any("ready." in line for line in process.stderr)
    finally:
        process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_the_nearest_slices_are_told_as_a_table(http, service, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    one, other = Identity("SEARCHED-1"), Identity("SEARCHED-2")
    embed(http, slice_files(one, count=3, seed=11))
    embed(http, slice_files(other, count=3, seed=11))
    ask = [one.series_uid, "1", "--service", service.address]

    nearest = CliRunner().invoke(app, ["search", *ask, "-k", "1"])
    again = CliRunner().invoke(app, ["search", *ask, "-k", "1", "--exclude", "none", "--json"])
    nothing = CliRunner().invoke(app, ["search", one.series_uid, "--service", service.address])

    assert nearest.exit_code == 0, nearest.output
    assert "1.0000" in nearest.stdout and other.series_uid in nearest.stdout
    assert json.loads(again.stdout)["hits"][0]["score"] == pytest.approx(1, abs=1e-3)
    assert (nothing.exit_code, "its slice's number, or a file" in nothing.output) == (2, True)
