"""The catalog's engine: SQLite in WAL mode or PostgreSQL, the same code on both."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.orm import Session

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"


class Database:
    """Sessions that read, and sessions that write in one transaction: for good, or as a note."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        self._write_engine = self.engine.execution_options(keyslice_write="FULL")
        self._note_engine = self.engine.execution_options(keyslice_write="NORMAL")

    @contextmanager
    def note(self) -> Iterator[Session]:
        """A write that a power cut may take back: progress is not worth waiting for the disk."""
        with Session(self._note_engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def read(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        with Session(self._write_engine, expire_on_commit=False) as session, session.begin():
            yield session


def open_engine(url: str) -> Engine:
    # hide_parameters: an error must not quote a patient.
    engine = create_engine(url, hide_parameters=True, pool_pre_ping=not url.startswith("sqlite"))
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_pragmas)
        event.listen(engine, "begin", _sqlite_begin)
    return engine


def upgrade(url: str, lock_dir: Path) -> None:
    """Bring the schema to the newest revision; several processes may start at once."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    with FileLock(lock_dir / "migrations.lock"):
        command.upgrade(config, "head")


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours: see _sqlite_begin
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    # A read transaction that turns into a write fails at once where another writer came between; one that
    # says so at the start waits its turn.
    if synchronous := connection.get_execution_options().get("keyslice_write"):
        connection.exec_driver_sql(f"PRAGMA synchronous={synchronous}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("BEGIN")
