"""Dockerfile and docker-compose.yml as far as they can be checked without an engine, and the service as they leave it:
on a root that cannot be written, without a capability.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from celery.bin.celery import celery
from conftest import missing
from posting import embed, slice_files
from typer.main import get_command

from models.ct.phantom import Identity
from service.cli import app as keyslice
from service.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
OURS = {name: each for name, each in COMPOSE["services"].items() if "build" in each}
DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
CMD = json.loads(re.search(r"^CMD (.*)$", DOCKERFILE, re.MULTILINE)[1])

# A mount namespace of its own, where the root is read-only but for /tmp and the data directory.
SEALED = """
set -e
mount --make-rprivate /
mkdir -p "$KEYSLICE_DATA_DIR" && mount --bind "$KEYSLICE_DATA_DIR" /mnt
mount -t tmpfs tmpfs /tmp
mount -o remount,bind,ro /
! touch /usr/keyslice 2>/dev/null
export KEYSLICE_DATA_DIR=/mnt KEYSLICE_WEIGHTS_DIR=/mnt/weights
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""


def check(command: list[str]) -> None:
    """Raises for an option or a command that is not there."""
    program, *arguments = command
    parser: Any = {"keyslice": get_command(keyslice), "uvicorn": uvicorn.main, "celery": celery}[program]
    if program == "celery":
        assert arguments[:2] == ["-A", "workers.app"]
        del arguments[:2]
    while hasattr(parser, "commands"):
        parser = parser.commands[arguments.pop(0)]
    parser.make_parser(parser.context_class(parser)).parse_args(arguments)


@pytest.mark.parametrize("command", [CMD, *(each["command"] for each in OURS.values() if "command" in each)])
def test_every_command_is_one(command):
    check(command)


def test_a_command_that_is_not_there_would_be_seen():
    for wrong in (["keyslice", "receive", "--hots", "0.0.0.0"], [*CMD, "--timeout-keepalive", "75"]):
        with pytest.raises(Exception, match="No such option"):
            check(wrong)


def test_the_image_is_of_nobody_in_particular():
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    base = {name: of for of, name in stages}

    assert {each["build"]["target"] for each in OURS.values()} == {"cpu", "cuda"} <= set(base)
    assert base["cpu"] == base["cuda"] == "base"
    assert re.search(r"^USER keyslice$", DOCKERFILE.partition("AS base")[2], re.MULTILINE)
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    assert all((ROOT / name).exists() for names in copied for name in names.split())


@pytest.mark.parametrize("name", OURS)
def test_containers_may_write_data_and_temporary_files_and_nothing_else(name):
    service = OURS[name]

    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert service["volumes"] == ["data:/data"]


def test_every_variable_is_a_setting_and_every_name_is_there():
    settings = {f"KEYSLICE_{name.upper()}" for name in Settings.model_fields}
    for service in OURS.values():
        assert {name for name in service["environment"] if name.startswith("KEYSLICE_")} <= settings
        assert set(service["depends_on"]) <= set(COMPOSE["services"])
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            place = volume.partition(":")[0]
            assert (ROOT / place).is_file() if place.startswith(".") else place in COMPOSE["volumes"]


def test_ports_are_those_of_the_host_alone_but_for_dicom():
    published = {name: each["ports"] for name, each in COMPOSE["services"].items() if "ports" in each}

    assert all(port.startswith("127.0.0.1:") for name in published if name != "receiver" for port in published[name])


def test_prometheus_has_the_alerts_and_asks_the_api():
    config = yaml.safe_load((ROOT / "docs/monitoring/prometheus.yml").read_text())

    (job,) = config["scrape_configs"]
    assert config["rule_files"] == ["alerts.yml"]
    assert job["job_name"] == "keyslice"  # as the alerts name it
    assert job["static_configs"] == [{"targets": ["api:8000"]}]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{COMPOSE['services']['prometheus']['secrets'][0]}"


def test_the_service_embeds_on_a_root_that_cannot_be_written(tmp_path):
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"):
        missing("no root, unshare and setpriv to make a root that cannot be written")
    port = free_port()
    variables = os.environ | {"KEYSLICE_DATA_DIR": str(tmp_path), "KEYSLICE_PORT": str(port)}
    command = [sys.executable, "-m", "service.cli", "up"]
    sealed = ["unshare", "--mount", "bash", "-c", SEALED, "sealed", *command]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(sealed, env=variables, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            wait_until_ready(http, process, tmp_path / "out")
            embed(http, slice_files(Identity("SEALED"), count=3))
            assert http.get(f"/v1/series/{Identity('SEALED').series_uid}/embeddings").status_code == 200
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(http: httpx.Client, process: subprocess.Popen, out: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end:
        assert process.poll() is None, out.read_text()
        try:
            if http.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(out.read_text())
