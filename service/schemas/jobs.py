"""Work that a caller can watch."""

from datetime import datetime
from typing import Literal

from pydantic import Field

from service.schemas.base import Schema
from service.schemas.series import State

JobKind = Literal["embed", "train", "export"]
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]


class JobSeries(Schema):
    series_uid: str
    state: State
    done: int
    known: int
    error: str | None


class JobSummary(Schema):
    job_id: str
    kind: JobKind
    state: JobState
    created_at: datetime
    ended_at: datetime | None = Field(description="null while it is open")
    done: int
    known: int
    unit: Literal["slices", "epochs", "files", "series"] = Field(
        description="of an export: files while it is scanned, how many there are being unknown, then series"
    )
    states: dict[str, int] = Field(description="series of an upload or an export by state")
    head_id: str | None
    export_id: str | None
    name: str | None = Field(description="of a head its name and version, of an export its URI")
    subject: str = Field(
        description="path of the head or the export; of an upload the job's own, which names its series"
    )
    error: str | None


class Job(JobSummary):
    series: list[JobSeries] = Field(description="of an upload")


class JobPage(Schema):
    jobs: list[JobSummary]
    next_cursor: str | None
