"""Versions of heads, networks of heads in training, predictions that were given, cancelled jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("heads") as heads:
        heads.add_column(sa.Column("name", sa.String(), nullable=True))
        heads.add_column(sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
        heads.add_column(sa.Column("promoted", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.execute("UPDATE heads SET name = head_id")
    op.execute(sa.text("UPDATE heads SET promoted = :yes WHERE state = 'ready'").bindparams(yes=True))
    with op.batch_alter_table("heads") as heads:
        heads.alter_column("name", existing_type=sa.String(), nullable=False)
        heads.create_unique_constraint("uq_heads_name_version", ["name", "version"])
    with op.batch_alter_table("jobs") as jobs:
        jobs.add_column(sa.Column("cancelled_at", sa.DateTime(timezone=True), nullable=True))

    op.create_table(
        "head_networks",
        sa.Column("head_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("network", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["head_id"], ["heads.head_id"], name="fk_head_networks_head_id_heads"),
        sa.PrimaryKeyConstraint("head_id", "name", name="pk_head_networks"),
    )
    op.create_table(
        "predictions",
        sa.Column("prediction_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("patient_key", sa.String(), nullable=False),
        sa.Column("head_id", sa.String(), nullable=False),
        sa.Column("asked", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["patient_key"], ["patients.patient_key"], name="fk_predictions_patient_key_patients"),
        sa.ForeignKeyConstraint(["head_id"], ["heads.head_id"], name="fk_predictions_head_id_heads"),
        sa.PrimaryKeyConstraint("prediction_id", name="pk_predictions"),
    )
    op.create_index("ix_predictions_patient_key", "predictions", ["patient_key"])
    op.create_table(
        "prediction_bags",
        sa.Column("prediction_id", sa.String(), nullable=False),
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(
            ["prediction_id"], ["predictions.prediction_id"], name="fk_prediction_bags_prediction_id_predictions"
        ),
        sa.ForeignKeyConstraint(["series_uid"], ["series.series_uid"], name="fk_prediction_bags_series_uid_series"),
        sa.PrimaryKeyConstraint("prediction_id", "series_uid", name="pk_prediction_bags"),
    )
    op.create_index("ix_prediction_bags_series_uid", "prediction_bags", ["series_uid"])


def downgrade() -> None:
    op.drop_index("ix_prediction_bags_series_uid", "prediction_bags")
    op.drop_table("prediction_bags")
    op.drop_index("ix_predictions_patient_key", "predictions")
    op.drop_table("predictions")
    op.drop_table("head_networks")
    with op.batch_alter_table("jobs") as jobs:
        jobs.drop_column("cancelled_at")
    with op.batch_alter_table("heads") as heads:
        heads.drop_constraint("uq_heads_name_version", type_="unique")
        heads.drop_column("promoted")
        heads.drop_column("version")
        heads.drop_column("name")
