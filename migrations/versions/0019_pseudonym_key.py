"""The fingerprint of the key that pseudonyms are by."""

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "pseudonym_key",
        sa.Column("only", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("fingerprint", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("only", name=op.f("pk_pseudonym_key")),
    )


def downgrade() -> None:
    op.drop_table("pseudonym_key")
