"""How many series of a sender wait is looked up, not counted among everybody's."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_embeddings_sender_state", "embeddings", ["sender", "state"])


def downgrade() -> None:
    op.drop_index("ix_embeddings_sender_state", "embeddings")
