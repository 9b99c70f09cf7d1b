"""The schema's steps, forth and back, with something in every table."""

from datetime import UTC, datetime
from typing import Any

import pytest
import sqlalchemy
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import MetaData, Table

from service.embedded import CannotStart, up
from service.settings import Settings
from service.storage.database import MIGRATIONS, SchemaIsNewer, upgrade
from service.storage.tables import Row

# 0007 has every bag written into an index of another layout.
CHANGED_ON_PURPOSE = {"embeddings": {"indexed_content"}}
# 0018: an earlier version would let keys that are limited see everything.
GONE_ON_PURPOSE = {"0018": {"api_keys"}}
MADE_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def config_of(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


REVISIONS = [each.revision for each in ScriptDirectory.from_config(config_of("")).walk_revisions()][::-1]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path) -> str:
    if request.param == "postgresql":
        return request.getfixturevalue("postgres_url")
    return f"sqlite:///{tmp_path / 'catalog.db'}"


def value_of(column: sqlalchemy.Column[Any]) -> Any:
    """One value per type, so that rows refer to each other whatever refers to what."""
    kind = column.type
    if isinstance(kind, sqlalchemy.JSON):
        return {"a": [1]}
    if isinstance(kind, sqlalchemy.DateTime):
        return MADE_AT
    if isinstance(kind, sqlalchemy.LargeBinary):
        return b"\x00\xff"
    if isinstance(kind, sqlalchemy.Boolean):
        return True
    if isinstance(kind, sqlalchemy.Integer | sqlalchemy.Float | sqlalchemy.Numeric):
        return 1
    return "1.2.3"


def fill(engine: sqlalchemy.Engine) -> list[str]:
    """A row in every table; the tables' names."""
    metadata = MetaData()
    metadata.reflect(engine)
    tables = [table for table in metadata.sorted_tables if table.name != "alembic_version"]
    with engine.begin() as connection:
        for table in tables:
            connection.execute(table.insert().values({column.name: value_of(column) for column in table.columns}))
    return [table.name for table in tables]


def read(engine: sqlalchemy.Engine, table: str) -> list[dict[str, Any]]:
    reflected = Table(table, MetaData(), autoload_with=engine)
    with engine.connect() as connection:
        return [dict(row) for row in connection.execute(sqlalchemy.select(reflected)).mappings()]


@pytest.mark.parametrize("revision", REVISIONS)
def test_what_an_earlier_version_wrote_is_there_after_the_upgrade(url, tmp_path, revision):
    """Row by row and column by column, but for what a revision changes on purpose."""
    command.upgrade(config_of(url), revision)
    engine = sqlalchemy.create_engine(url)
    tables = fill(engine)
    before = {table: read(engine, table) for table in tables}

    upgrade(url, tmp_path)

    for table, (row,) in before.items():
        (now,) = read(engine, table)
        changed = {column for column, value in row.items() if now[column] != value}
        assert changed <= CHANGED_ON_PURPOSE.get(table, set()), table
    assert sqlalchemy.inspect(engine).has_table("audit")
    engine.dispose()


@pytest.mark.parametrize("revision", REVISIONS)
def test_one_step_back_keeps_what_the_earlier_version_knows(url, tmp_path, revision):
    config = config_of(url)
    command.upgrade(config, revision)
    engine = sqlalchemy.create_engine(url)
    before = {table: read(engine, table) for table in fill(engine)}

    command.downgrade(config, "-1")

    kept = set(sqlalchemy.inspect(engine).get_table_names()) - {"alembic_version"}
    for table in kept - GONE_ON_PURPOSE.get(revision, set()):
        (row,), (now,) = before[table], read(engine, table)
        assert now == {column: row[column] for column in now}, table
    upgrade(url, tmp_path)
    engine.dispose()


def test_a_schema_goes_all_the_way_back(url, tmp_path):
    upgrade(url, tmp_path)
    upgrade(url, tmp_path)

    command.downgrade(config_of(url), "base")

    engine = sqlalchemy.create_engine(url)
    assert sqlalchemy.inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_the_migrations_make_the_tables_that_the_code_knows(url, tmp_path):
    upgrade(url, tmp_path)

    engine = sqlalchemy.create_engine(url)
    found = MetaData()
    found.reflect(engine)
    columns = {name: {*table.columns.keys()} for name, table in found.tables.items() if name != "alembic_version"}
    assert columns == {name: {*table.columns.keys()} for name, table in Row.metadata.tables.items()}
    engine.dispose()


def test_a_catalog_that_a_newer_version_has_opened_is_refused(url, tmp_path):
    upgrade(url, tmp_path)
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(SchemaIsNewer, match=r"revision 9999, expected .* or earlier: a newer version of Keyslice"):
        upgrade(url, tmp_path)
    with pytest.raises(CannotStart, match="revision 9999"):
        up(Settings(data_dir=tmp_path, database_url=url))
    engine.dispose()


def test_a_catalog_that_is_not_there_is_said_before_anything_starts(tmp_path):
    nowhere = "postgresql+psycopg://postgres@127.0.0.1:9/test"
    with pytest.raises(CannotStart, match="the catalog cannot be opened: OperationalError"):
        up(Settings(data_dir=tmp_path, database_url=nowhere))


def test_an_upgrade_that_fails_changes_nothing(url, tmp_path):
    command.upgrade(config_of(url), "0010")
    engine = sqlalchemy.create_engine(url)
    fill(engine)
    with engine.begin() as connection:  # 0016 would index its rows
        connection.execute(sqlalchemy.text("DROP TABLE job_series"))
    before = sorted(sqlalchemy.inspect(engine).get_table_names())

    with pytest.raises(sqlalchemy.exc.DBAPIError):
        upgrade(url, tmp_path)

    assert sorted(sqlalchemy.inspect(engine).get_table_names()) == before
    assert read(engine, "alembic_version") == [{"version_num": "0010"}]
    engine.dispose()
