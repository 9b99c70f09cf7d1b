"""Who asked for an embedding, so that nobody waits behind all that another has sent."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("embeddings", sa.Column("sender", sa.String(), server_default="", nullable=False))


def downgrade() -> None:
    op.drop_column("embeddings", "sender")
