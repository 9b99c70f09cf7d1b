"""Alembic's entry: runs the revisions against the catalog of the settings, or of the URL it is handed."""

from alembic import context
from sqlalchemy import text

from service.settings import Settings
from service.storage.database import open_engine
from service.storage.tables import Row

LOCK = 0x6B65_7973  # PostgreSQL's: machines that start at once upgrade one after the other

url = context.config.attributes.get("url") or Settings().catalog_url

with open_engine(url).connect() as connection:
    sqlite = connection.dialect.name == "sqlite"
    if sqlite:
        # A change of a table is a new table in its place, and what refers to the old one must not go with it. Only
        # outside of a transaction does SQLite listen.
        connection.connection.dbapi_connection.execute("PRAGMA foreign_keys=OFF")
    context.configure(connection=connection, target_metadata=Row.metadata, render_as_batch=True, transactional_ddl=True)
    with context.begin_transaction():
        if not sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)").bindparams(lock=LOCK))
        context.run_migrations()
        if sqlite and (broken := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()):
            raise RuntimeError(f"rows of {broken[0][0]} refer to rows of {broken[0][2]} that are not there")
