"""Exports of a PACS: what is asked for, and what became of it."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from models.ct.reasons import Reason
from service.schemas.base import Schema, Sent, Text
from service.schemas.pulls import BadRow, PacsQuery

ExportState = Literal["received", "queued", "running", "done", "failed", "cancelled"]
ExportSeriesState = Literal["waiting", "embedding", "embedded", "rejected", "failed", "set_aside", "cancelled", "found"]
Uri = Annotated[str, StringConstraints(min_length=1, max_length=12_000, pattern=r"^[^\x00]*$")]


class ExportRequest(Sent):
    uri: Uri = Field(
        description="an absolute path or file: URI of a directory, zip or tar on the service's machine, "
        "s3://bucket/prefix, or dicomweb+https://host/path with a query"
    )
    query: PacsQuery | None = Field(None, description="what is pulled from a DICOMweb server")
    queries: str | None = Field(
        None, max_length=4_000_000, description="several of them: CSV, the names of a query's fields as its header"
    )
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    dry_run: bool = Field(False, description="find the series, embed none")


class ExportAccepted(Schema):
    export_id: str
    job_id: str
    uri: str
    encoder_id: str
    state: ExportState
    bad_rows: list[BadRow] = Field([], description="rows of `queries` that are none; the others are pulled")
    resumed: bool = Field(description="whether it is an earlier export of the same that had not come to its end")


class ExportSummary(Schema):
    export_id: str
    job_id: str
    uri: str
    encoder_id: str
    dry_run: bool
    state: ExportState
    error: str | None
    created_at: datetime
    scanned_at: datetime | None = Field(description="when the last header was read; null before")
    ended_at: datetime | None
    bad_rows: list[BadRow] = Field([], description="rows of the table of queries that are none")


class ExportSeries(Schema):
    series_uid: str
    state: ExportSeriesState
    files: int
    slices: int | None = Field(description="in the embedding")
    set_aside: dict[Reason, int] = Field(description="files, and slices of the embedding, by reason")
    seconds: float | None = Field(description="from its copy to its embedding; 0 where it was embedded already")
    error: str | None


class Export(ExportSummary):
    files: int
    bytes: int
    slices: int = Field(description="in embeddings")
    set_aside: dict[Reason, int] = Field(description="files that are not used, by reason; /files names them")
    states: dict[ExportSeriesState, int] = Field(description="series by state")
    series: list[ExportSeries]
    next_cursor: str | None


class ExportPage(Schema):
    exports: list[ExportSummary]
    next_cursor: str | None


class ExportFileSetAside(Schema):
    file: str = Field(description="name below the export's root; bytes that are not UTF-8 as \\\\xff")
    size: int = Field(description="bytes")
    series_uid: str = Field(description="empty where its header names none")
    reason: Reason
    detail: str


class ExportFilePage(Schema):
    files: list[ExportFileSetAside]
    next_cursor: str | None
