"""Exports of a PACS: their files as the scan found them, what became of their series."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "exports",
        sa.Column("export_id", sa.String(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("uri", sa.String(), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("scanned_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(), nullable=True),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("known", sa.Integer(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_exports_job_id_jobs"),
        sa.PrimaryKeyConstraint("export_id", name="pk_exports"),
        sa.UniqueConstraint("job_id", name="uq_exports_job_id"),
    )
    op.create_index("ix_exports_uri", "exports", ["uri"])
    op.create_index("ix_exports_state", "exports", ["state"])
    op.create_table(
        "export_files",
        sa.Column("export_id", sa.String(), nullable=False),
        sa.Column("file_key", sa.LargeBinary(), nullable=False),
        sa.Column("name", sa.LargeBinary(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("place", sa.BigInteger(), nullable=False),
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("reason", sa.String(), nullable=True),
        sa.Column("detail", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["export_id"], ["exports.export_id"], name="fk_export_files_export_id_exports"),
        sa.PrimaryKeyConstraint("export_id", "file_key", name="pk_export_files"),
    )
    op.create_index("ix_export_files_series", "export_files", ["export_id", "series_uid"])
    op.create_table(
        "export_series",
        sa.Column("export_id", sa.String(), nullable=False),
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("files", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("seconds", sa.Double(), nullable=True),
        sa.Column("slices", sa.Integer(), nullable=True),
        sa.Column("slices_set_aside", sa.JSON(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["export_id"], ["exports.export_id"], name="fk_export_series_export_id_exports"),
        sa.PrimaryKeyConstraint("export_id", "series_uid", name="pk_export_series"),
    )
    op.create_index("ix_export_series_state", "export_series", ["export_id", "state"])


def downgrade() -> None:
    op.drop_table("export_series")
    op.drop_table("export_files")
    op.drop_table("exports")
