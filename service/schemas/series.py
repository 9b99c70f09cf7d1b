"""Uploads, series, slices and their embeddings."""

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from models.ct.reasons import Reason
from service.schemas.base import Schema

State = Literal["received", "queued", "embedding", "embedded", "indexed", "rejected", "failed"]


class FileSetAside(Schema):
    file: str
    reason: Reason
    detail: str


class SeriesReceived(Schema):
    series_uid: str
    state: State
    received: int = Field(description="instances that were new")
    duplicates: int = Field(description="instances that were here already, or twice in the upload")
    set_aside: list[FileSetAside]


class UploadReceived(Schema):
    job_id: str
    series: list[SeriesReceived]
    set_aside: list[FileSetAside] = Field(description="files that belong to none of the series")


class Finding(Schema):
    code: str
    found: dict[str, Any]


class SliceSetAside(Schema):
    sop_uid: str
    frame: int | None = Field(None, description="of a multi-frame instance, from 1")
    reason: Reason
    detail: str


class Verdict(Schema):
    status: Literal["accepted", "accepted_with_warnings", "rejected"]
    findings: list[Finding]
    set_aside: list[SliceSetAside]


class Geometry(Schema):
    slices: int
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None
    slice_spacing_mm: float | None
    z_mm: tuple[float, float] = Field(description="positions of the lowest and the highest slice")
    tilt_degrees: float
    kernels: list[str]


class EmbeddingState(Schema):
    encoder_id: str
    state: State
    slices: int | None
    done: int = Field(description="slices encoded so far")
    embedded_at: datetime | None
    error: str | None


class Series(Schema):
    series_uid: str
    study_uid: str
    patient_id: str
    state: State = Field(description="of the embedding last asked for")
    error: str | None
    received: int = Field(description="instances in the archive")
    received_at: datetime
    whole_at: datetime = Field(description="when it counts as whole and is embedded; of a network's series, the future")
    study_date: str = Field(description="YYYYMMDD, or empty")
    modality: str
    body_part: str
    manufacturer: str
    kernel: str
    verdict: Verdict | None
    geometry: Geometry | None
    embeddings: list[EmbeddingState]


class SeriesPage(Schema):
    series: list[Series]
    next_cursor: str | None


class SlicePosition(Schema):
    slice: int
    sop_uid: str
    frame: int | None = Field(
        None, description="of a multi-frame instance, from 1; null where the instance is the slice"
    )
    z_mm: float


class Embeddings(Schema):
    series_uid: str
    encoder_id: str
    windows: list[str]
    dim: int
    slices: list[SlicePosition]
    embeddings: list[list[list[float]]] = Field(description="(slices, windows, dim)")
    receipt: dict[str, Any]
