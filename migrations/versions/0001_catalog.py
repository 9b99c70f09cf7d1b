"""The catalog: patients, series, embeddings, heads, jobs, leases, canaries."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "canaries",
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("reference", sa.LargeBinary(), nullable=False),
        sa.Column("cosine", sa.Double(), nullable=False),
        sa.Column("checked_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("encoder_id", name="pk_canaries"),
    )
    op.create_table(
        "heads",
        sa.Column("head_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("labels", sa.JSON(), nullable=False),
        sa.Column("options", sa.JSON(), nullable=False),
        sa.Column("targets", sa.JSON(), nullable=False),
        sa.Column("report", sa.JSON(), nullable=True),
        sa.Column("weights", sa.LargeBinary(), nullable=True),
        sa.Column("graph", sa.LargeBinary(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(), nullable=True),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("known", sa.Integer(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.PrimaryKeyConstraint("head_id", name="pk_heads"),
    )
    op.create_index("ix_heads_encoder_id", "heads", ["encoder_id"])
    op.create_index("ix_heads_state", "heads", ["state"])

    op.create_table(
        "leases",
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("holder", sa.String(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_leases"),
    )
    op.create_table(
        "patients",
        sa.Column("patient_key", sa.String(), nullable=False),
        sa.Column("patient_id", sa.String(), nullable=False),
        sa.PrimaryKeyConstraint("patient_key", name="pk_patients"),
        sa.UniqueConstraint("patient_id", name="uq_patients_patient_id"),
    )
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("head_id", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["head_id"], ["heads.head_id"], name="fk_jobs_head_id_heads"),
        sa.PrimaryKeyConstraint("job_id", name="pk_jobs"),
    )
    op.create_table(
        "series",
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("study_uid", sa.String(), nullable=False),
        sa.Column("patient_key", sa.String(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("received", sa.Integer(), nullable=False),
        sa.Column("content", sa.String(), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("verdict", sa.JSON(), nullable=True),
        sa.Column("geometry", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["patient_key"], ["patients.patient_key"], name="fk_series_patient_key_patients"),
        sa.PrimaryKeyConstraint("series_uid", name="pk_series"),
    )
    op.create_index("ix_series_patient_key", "series", ["patient_key"])
    op.create_index("ix_series_study_uid", "series", ["study_uid"])

    op.create_table(
        "embeddings",
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.Column("content", sa.String(), nullable=True),
        sa.Column("slices", sa.Integer(), nullable=True),
        sa.Column("embedded_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("indexed_content", sa.String(), nullable=True),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("holder", sa.String(), nullable=True),
        sa.Column("touched_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("done", sa.Integer(), nullable=False),
        sa.Column("known", sa.Integer(), nullable=False),
        sa.Column("error", sa.String(), nullable=True),
        sa.ForeignKeyConstraint(["series_uid"], ["series.series_uid"], name="fk_embeddings_series_uid_series"),
        sa.PrimaryKeyConstraint("series_uid", "encoder_id", name="pk_embeddings"),
    )
    op.create_index("ix_embeddings_encoder_state", "embeddings", ["encoder_id", "state"])
    op.create_index("ix_embeddings_state", "embeddings", ["state"])

    op.create_table(
        "job_series",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("series_uid", sa.String(), nullable=False),
        sa.Column("encoder_id", sa.String(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name="fk_job_series_job_id_jobs"),
        sa.ForeignKeyConstraint(["series_uid"], ["series.series_uid"], name="fk_job_series_series_uid_series"),
        sa.PrimaryKeyConstraint("job_id", "series_uid", name="pk_job_series"),
    )


def downgrade() -> None:
    op.drop_table("job_series")
    op.drop_index("ix_embeddings_state", "embeddings")
    op.drop_index("ix_embeddings_encoder_state", "embeddings")

    op.drop_table("embeddings")
    op.drop_index("ix_series_study_uid", "series")
    op.drop_index("ix_series_patient_key", "series")

    op.drop_table("series")
    op.drop_table("jobs")
    op.drop_table("patients")
    op.drop_table("leases")
    op.drop_index("ix_heads_state", "heads")
    op.drop_index("ix_heads_encoder_id", "heads")

    op.drop_table("heads")
    op.drop_table("canaries")
