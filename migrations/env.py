"""Alembic's entry: runs the revisions against the catalog of the settings, or of the URL it is handed."""

from alembic import context

from service.settings import Settings
from service.storage.database import open_engine
from service.storage.tables import Row

url = context.config.attributes.get("url") or Settings().catalog_url

with open_engine(url).connect() as connection:
    context.configure(connection=connection, target_metadata=Row.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
