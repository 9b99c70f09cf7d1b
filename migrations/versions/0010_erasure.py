"""What is being erased and what was; an opaque key of every series, another one when it is posted again."""

import uuid

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "erasures",
        sa.Column("erasure_id", sa.String(), nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("emptied", sa.Boolean(), nullable=False),
        sa.Column("erased_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("patient_id", sa.String(), nullable=True),
        sa.Column("series", sa.Integer(), nullable=False),
        sa.Column("encoder_ids", sa.JSON(), nullable=False),
        sa.Column("heads", sa.JSON(), nullable=False),
        sa.Column("removed", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("erasure_id", name="pk_erasures"),
    )
    op.create_table(
        "erasing_series",
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("erasure_id", sa.String(), nullable=False),
        sa.Column("holders", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["erasure_id"], ["erasures.erasure_id"], name="fk_erasing_series_erasure_id_erasures"),
        sa.PrimaryKeyConstraint("series_uid", name="pk_erasing_series"),
    )
    op.create_index("ix_erasing_series_erasure_id", "erasing_series", ["erasure_id"])
    with op.batch_alter_table("series") as series:
        series.add_column(sa.Column("series_key", sa.String(), nullable=True))
    table = sa.table("series", sa.column("series_uid", sa.String()), sa.column("series_key", sa.String()))
    connection = op.get_bind()
    keyed = sa.update(table).where(table.c.series_uid == sa.bindparam("uid")).values(series_key=sa.bindparam("key"))
    uids = list(connection.scalars(sa.select(table.c.series_uid)))
    if uids:
        connection.execute(keyed, [{"uid": uid, "key": uuid.uuid4().hex} for uid in uids])
    with op.batch_alter_table("series") as series:
        series.alter_column("series_key", existing_type=sa.String(), nullable=False)


def downgrade() -> None:
    with op.batch_alter_table("series") as series:
        series.drop_column("series_key")
    op.drop_index("ix_erasing_series_erasure_id", "erasing_series")
    op.drop_table("erasing_series")
    op.drop_table("erasures")
