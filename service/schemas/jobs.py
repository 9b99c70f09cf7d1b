"""Work that a caller can watch."""

from datetime import datetime
from typing import Literal

from service.schemas.base import Schema
from service.schemas.series import State

JobState = Literal["waiting", "running", "done", "failed", "cancelled"]


class JobSeries(Schema):
    series_uid: str
    state: State
    done: int
    known: int
    error: str | None


class Job(Schema):
    job_id: str
    kind: Literal["embed", "train"]
    state: JobState
    created_at: datetime
    done: int
    known: int
    unit: Literal["slices", "epochs"]
    series: list[JobSeries]
    head_id: str | None
    error: str | None
