"""Work that a caller can watch."""

from datetime import datetime
from typing import Literal

from pydantic import Field

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
    kind: Literal["embed", "train", "export"]
    state: JobState
    created_at: datetime
    done: int
    known: int
    unit: Literal["slices", "epochs", "files", "series"] = Field(
        description="of an export: files while it is scanned, how many there are being unknown, then series"
    )
    states: dict[str, int] = Field({}, description="series of an upload or an export by state")
    series: list[JobSeries] = Field(description="of an upload")
    head_id: str | None
    export_id: str | None
    error: str | None
