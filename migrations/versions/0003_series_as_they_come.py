"""Series that come piece by piece: when one counts as whole, and what its header says of study and series."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

TEXTS = ("study_date", "accession_number", "modality", "body_part", "manufacturer", "kernel")
SEARCHED = ("study_date", "accession_number")


def upgrade() -> None:
    with op.batch_alter_table("series") as series:
        series.add_column(sa.Column("collecting_since", sa.DateTime(timezone=True), nullable=True))
        series.add_column(sa.Column("whole_at", sa.DateTime(timezone=True), nullable=True))
        series.add_column(sa.Column("expected", sa.Integer(), nullable=True))
        series.add_column(sa.Column("header", sa.JSON(), nullable=False, server_default="{}"))
        for name in TEXTS:
            series.add_column(sa.Column(name, sa.String(), nullable=False, server_default=""))
    op.execute("UPDATE series SET whole_at = received_at")
    with op.batch_alter_table("series") as series:
        series.alter_column("whole_at", existing_type=sa.DateTime(timezone=True), nullable=False)
    op.create_index("ix_series_whole_at", "series", ["whole_at"])
    for name in SEARCHED:
        op.create_index(f"ix_series_{name}", "series", [name])


def downgrade() -> None:
    for name in (*SEARCHED, "whole_at"):
        op.drop_index(f"ix_series_{name}", "series")
    with op.batch_alter_table("series") as series:
        for name in (*TEXTS, "header", "expected", "whole_at", "collecting_since"):
            series.drop_column(name)
