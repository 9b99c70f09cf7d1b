"""API keys that are limited to the series of some tags."""

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("api_keys") as keys:
        keys.add_column(sa.Column("tags", sa.JSON(), nullable=False, server_default="[]"))


def downgrade() -> None:
    # An earlier version lets them see every series: limited keys go, and nobody who had one is let in.
    op.execute(sa.text("DELETE FROM api_keys WHERE CAST(tags AS VARCHAR) <> '[]'"))
    with op.batch_alter_table("api_keys") as keys:
        keys.drop_column("tags")
