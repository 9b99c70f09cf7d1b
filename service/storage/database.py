"""The catalog's engine: SQLite in WAL mode or PostgreSQL, the same code on both."""

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, func, select
from sqlalchemy.orm import Session

SCRUBBED = 1  # user_version of an SQLite file whose every page was written with secure_delete
BLOCK_BYTES = 2**22
SQLITE_CONNECTIONS = (
    40  # as many as Starlette has threads: what is over would be opened and set up anew for each request
)
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

    def scrub(self, marks: Collection[str] | None) -> bool:
        """Take what was deleted out of the database's own files too; False while a reader holds them.

        SQLite: the WAL is folded in and truncated. Where one of the marks is still in the file, where nobody knows the
        marks (None), and once in the life of a file that older versions wrote, the file is written anew.
        PostgreSQL: VACUUM, which is not all: see docs/privacy.md.
        """
        if self.engine.dialect.name != "sqlite":
            with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM")
            return True
        raw = self.engine.raw_connection()
        try:
            cursor = raw.cursor()
            if not _fold_wal(cursor):
                return False
            (written_by,) = cursor.execute("PRAGMA user_version").fetchone()
            if marks is None or written_by < SCRUBBED or _holds(Path(self.engine.url.database or ""), marks):
                cursor.execute("VACUUM")
                cursor.execute(f"PRAGMA user_version={SCRUBBED}")
            return _fold_wal(cursor)
        except sqlite3.OperationalError:  # locked for longer than we wait
            return False
        finally:
            raw.close()


def _fold_wal(cursor: Any) -> bool:
    busy, *_ = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not busy


def _holds(path: Path, marks: Collection[str]) -> bool:
    """Whether one of some short texts is in a file."""
    wanted, before = [mark.encode() for mark in marks], b""
    overlap = max(map(len, wanted), default=1)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            if any(mark in before + block for mark in wanted):
                return True
            before = block[-overlap:]
    return False


def alone(session: Session, name: str) -> None:
    """Hold a lock of this name until the transaction ends. On SQLite whoever writes is alone anyway."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(name, 0))))


def open_engine(url: str) -> Engine:
    # hide_parameters: an error must not quote a patient.
    own: dict[str, Any] = {"pool_size": SQLITE_CONNECTIONS} if url.startswith("sqlite") else {"pool_pre_ping": True}
    engine = create_engine(url, hide_parameters=True, **own)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _sqlite_pragmas)
        event.listen(engine, "begin", _sqlite_begin)
    return engine


class SchemaIsNewer(Exception):
    """A newer version of Keyslice has opened the catalog."""


def upgrade(url: str, lock_dir: Path) -> None:
    """Bring the schema to the newest revision; several processes may start at once. Raises SchemaIsNewer."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    with FileLock(lock_dir / "migrations.lock"):
        _refuse_newer(url, ScriptDirectory.from_config(config))
        command.upgrade(config, "head")


def _refuse_newer(url: str, ours: ScriptDirectory) -> None:
    with open_engine(url).connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found and found not in {each.revision for each in ours.walk_revisions()}:
        raise SchemaIsNewer(
            f"the catalog's schema is of revision {found}, expected {ours.get_current_head()} or earlier: a newer "
            "version of Keyslice has opened it; run that one, or restore the backup made before"
        )


def _sqlite_pragmas(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # BEGIN is ours: see _sqlite_begin
    # busy_timeout first: the others may have to wait. secure_delete: what is deleted is overwritten with zeros, for
    # scrub() to be short.
    for pragma in ("busy_timeout=30000", "journal_mode=WAL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: Connection) -> None:
    # A read transaction that turns into a write fails at once where another writer came between; one that
    # says so at the start waits its turn.
    if synchronous := connection.get_execution_options().get("keyslice_write"):
        connection.exec_driver_sql(f"PRAGMA synchronous={synchronous}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql("BEGIN")
