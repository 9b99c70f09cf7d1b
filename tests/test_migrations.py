"""The schema's steps, forth and back."""

import sqlalchemy
from alembic import command
from alembic.config import Config

from service.storage.database import MIGRATIONS, upgrade


def test_a_schema_goes_up_and_down_again(tmp_path):
    url = f"sqlite:///{tmp_path / 'catalog.db'}"
    upgrade(url, tmp_path)
    upgrade(url, tmp_path)
    engine = sqlalchemy.create_engine(url)
    tables = set(sqlalchemy.inspect(engine).get_table_names())

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    command.downgrade(config, "base")

    assert tables > {"patients", "series", "embeddings", "heads", "jobs", "leases", "canaries"}
    assert sqlalchemy.inspect(engine).get_table_names() == ["alembic_version"]
