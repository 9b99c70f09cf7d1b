"""Which table each encoder's searches use and how well, tags of series, series in one vector."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "indexes",
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("table_name", sa.String(), nullable=False),
        sa.Column("broken", sa.Boolean(), nullable=False),
        sa.Column("built_rows", sa.Integer(), nullable=True),
        sa.Column("built_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("build_seconds", sa.Double(), nullable=True),
        sa.Column("recall", sa.Double(), nullable=True),
        sa.Column("nprobes", sa.Integer(), nullable=True),
        sa.Column("refine", sa.Integer(), nullable=True),
        sa.Column("measured", sa.JSON(), nullable=True),
        sa.PrimaryKeyConstraint("encoder_id", name="pk_indexes"),
    )
    op.create_table(
        "series_tags",
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("tag", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["series_uid"], ["series.series_uid"], name="fk_series_tags_series_uid_series", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("series_uid", "tag", name="pk_series_tags"),
    )
    op.create_index("ix_series_tags_tag", "series_tags", ["tag"])
    op.create_table(
        "pooled",
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("pooling", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("vector", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["series_uid"], ["series.series_uid"], name="fk_pooled_series_uid_series", ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("series_uid", "encoder_id", "pooling", name="pk_pooled"),
    )
    with op.batch_alter_table("embeddings") as embeddings:
        embeddings.add_column(sa.Column("indexed_rows", sa.Integer(), nullable=True))
    # Tables of the layout before have no row in `indexes`: every bag goes into a new one.
    op.execute("UPDATE embeddings SET indexed_content = NULL")
    op.execute("UPDATE embeddings SET state = 'embedded' WHERE state = 'indexed'")


def downgrade() -> None:
    with op.batch_alter_table("embeddings") as embeddings:
        embeddings.drop_column("indexed_rows")
    op.drop_table("pooled")
    op.drop_index("ix_series_tags_tag", "series_tags")
    op.drop_table("series_tags")
    op.drop_table("indexes")
