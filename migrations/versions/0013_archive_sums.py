"""The SHA-256 of every file of the archive, as it arrived."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0014"  # which was merged first
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Files that are there already have none: they get one when they are sent again.
    op.create_table(
        "archive_sums",
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("sop_uid", sa.String(), nullable=False),
        sa.Column("sha256", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["series_uid"], ["series.series_uid"], name="fk_archive_sums_series_uid_series"),
        sa.PrimaryKeyConstraint("series_uid", "sop_uid", name="pk_archive_sums"),
    )


def downgrade() -> None:
    op.drop_table("archive_sums")
