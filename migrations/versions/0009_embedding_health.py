"""What each bag in the index shows of its encoder's health, and the canary day by day."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0007"
branch_labels = None
depends_on = None

MEASURED = ("norm", "norm_spread", "effective_rank")


def upgrade() -> None:
    # Bags that are in the index already are measured when it is rebuilt.
    with op.batch_alter_table("embeddings") as embeddings:
        for name in MEASURED:
            embeddings.add_column(sa.Column(name, sa.Double(), nullable=True))
    there = sa.text("norm IS NOT NULL")
    op.create_index(
        "ix_embeddings_measured",
        "embeddings",
        ["encoder_id", "embedded_at"],
        sqlite_where=there,
        postgresql_where=there,
    )
    op.create_table(
        "canary_days",
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("day", sa.String(), nullable=False),
        sa.Column("lowest", sa.Double(), nullable=False),
        sa.Column("checks", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["encoder_id"], ["canaries.encoder_id"], name="fk_canary_days_encoder_id_canaries"),
        sa.PrimaryKeyConstraint("encoder_id", "day", name="pk_canary_days"),
    )


def downgrade() -> None:
    op.drop_table("canary_days")
    op.drop_index("ix_embeddings_measured", "embeddings")
    with op.batch_alter_table("embeddings") as embeddings:
        for name in reversed(MEASURED):
            embeddings.drop_column(name)
