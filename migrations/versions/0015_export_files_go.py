"""Exports know how many files they had; rows of files that were used go."""

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("exports") as exports:
        exports.add_column(sa.Column("files", sa.Integer(), nullable=True))
        exports.add_column(sa.Column("bytes", sa.BigInteger(), nullable=True))
        exports.add_column(sa.Column("trimmed", sa.Boolean(), nullable=False, server_default=sa.false()))
    exports = sa.table("exports", *map(sa.column, ("export_id", "scanned_at", "files", "bytes")))
    files = sa.table("export_files", *map(sa.column, ("export_id", "size")))
    mine = files.c.export_id == exports.c.export_id
    count = sa.select(sa.func.count()).select_from(files).where(mine).scalar_subquery()
    size = sa.select(sa.func.coalesce(sa.func.sum(files.c.size), 0)).where(mine).scalar_subquery()
    scanned = sa.update(exports).where(exports.c.scanned_at.is_not(None))
    op.execute(scanned.values(files=count, bytes=size))


def downgrade() -> None:
    # An earlier version counts the rows that are left.
    with op.batch_alter_table("exports") as exports:
        exports.drop_column("trimmed")
        exports.drop_column("bytes")
        exports.drop_column("files")
