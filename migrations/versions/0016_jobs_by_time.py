"""Indexes for the list of jobs: by time, and from what is open to the job that asked for it."""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_jobs_created_at", "jobs", ["created_at", "job_id"])
    op.create_index("ix_jobs_head_id", "jobs", ["head_id"])
    op.create_index("ix_job_series_series_uid", "job_series", ["series_uid"])


def downgrade() -> None:
    op.drop_index("ix_job_series_series_uid", "job_series")
    op.drop_index("ix_jobs_head_id", "jobs")
    op.drop_index("ix_jobs_created_at", "jobs")
