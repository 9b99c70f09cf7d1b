"""What crosses the wire: requests and answers, each once."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.ct.screening import Reason

State = Literal["received", "queued", "embedding", "embedded", "indexed", "rejected", "failed"]
HeadState = Literal["received", "queued", "training", "ready", "failed"]
JobState = Literal["waiting", "running", "done", "failed"]

# Text that a database and an index can hold; PostgreSQL refuses NUL.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class Schema(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Problem(BaseModel):
    """RFC 9457: what went wrong, what was found and what was expected."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:keyslice:series-not-found"])
    title: str
    status: int
    detail: str


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
    verdict: Verdict | None
    geometry: Geometry | None
    embeddings: list[EmbeddingState]


class SeriesPage(Schema):
    series: list[Series]
    next_cursor: str | None


class SlicePosition(Schema):
    slice: int
    sop_uid: str
    z_mm: float


class Embeddings(Schema):
    series_uid: str
    encoder_id: str
    windows: list[str]
    dim: int
    slices: list[SlicePosition]
    embeddings: list[list[list[float]]] = Field(description="(slices, windows, dim)")
    receipt: dict[str, Any]


class Instance(SlicePosition):
    series_uid: str
    window: str
    weight: float


class Attention(Schema):
    series_uid: str
    head_id: str
    encoder_id: str
    labels: list[str]
    instances: list[Instance] = Field(description="every slice at every window; weights sum to 1")
    window_share: dict[str, float]
    top_slices: list["TopSlice"]


class TopSlice(SlicePosition):
    series_uid: str
    weight: float = Field(description="summed over the windows")


class Predictions(Schema):
    patient_id: str
    head_id: str
    encoder_id: str
    probabilities: dict[str, float]
    series: list[str] = Field(description="the series whose bags were read together")
    window_share: dict[str, float]
    top_slices: list[TopSlice]


class Filters(BaseModel):
    """Rows a search may answer with."""

    model_config = ConfigDict(extra="forbid")

    series_uid: Text | None = None
    study_uid: Text | None = None
    patient_id: Text | None = None


class SearchRequest(BaseModel):
    """Either a stored slice at a window, or a vector and the encoder it is of."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"series_uid": "1.2.3", "slice": 70, "window": "lung", "k": 5, "exclude": "patient"}]
        },
    )

    series_uid: Text | None = None
    slice: int | None = Field(None, ge=0, le=2**31 - 1)
    window: Text | None = Field(None, description="of the stored slice, and of the hits; any for a vector where unset")
    vector: list[float] | None = Field(None, max_length=65536)
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    k: int = Field(10, ge=1)
    exclude: Literal["none", "series", "study", "patient"] = "none"
    filters: Filters = Filters()
    exact: bool = Field(False, description="every search is exact so far")

    @model_validator(mode="after")
    def _one_kind(self) -> "SearchRequest":
        by_slice = (self.series_uid, self.slice, self.window)
        if self.vector is None:
            if any(part is None for part in by_slice):
                raise ValueError("expected series_uid, slice and window together, or vector and encoder")
        elif self.series_uid is not None or self.slice is not None:
            raise ValueError("found both a stored slice and a vector, expected one of them")
        elif self.encoder is None:
            raise ValueError("a vector needs the encoder it is of")
        elif self.exclude != "none":
            raise ValueError("exclude needs a stored slice, a vector has no series")
        return self


class Hit(SlicePosition):
    series_uid: str
    window: str
    patient_id: str
    score: float = Field(description="cosine")


class SearchAnswer(Schema):
    hits: list[Hit]
    encoder_id: str
    index: Literal["exact"]
    recall: float = Field(description="at k against exact search; 1 where the search is exact")


class HeadTraining(BaseModel):
    """The form beside the labels file. The paper's hyper-parameters by default."""

    model_config = ConfigDict(extra="forbid")

    labels: UploadFile = Field(description="CSV: patient_id or series_uid, then a column of 0 and 1 per label")
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    task: Literal["multilabel", "one_of_n"] = "multilabel"
    folds: int = Field(5, ge=2, le=50)
    epochs: int = Field(32, ge=1, le=10_000)
    patience: int = Field(8, ge=1, le=10_000)
    batch_size: int = Field(128, ge=1, le=4096)
    learning_rate: float = Field(1e-4, gt=0, le=1)
    weight_decay: float = Field(1e-2, ge=0, le=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    seed: int = Field(0, ge=0, lt=2**31)


class HeadAccepted(Schema):
    job_id: str
    head_id: str


class Head(Schema):
    head_id: str
    state: HeadState
    error: str | None
    created_at: datetime
    encoder_id: str
    labels: list[str]
    options: dict[str, Any]
    report: dict[str, Any] | None


class HeadPage(Schema):
    heads: list[Head]
    next_cursor: str | None


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


class EncoderWindow(Schema):
    name: str
    low: float = Field(description="HU")
    high: float = Field(description="HU")


class Encoder(Schema):
    name: str
    encoder_id: str | None = Field(description="null where the weights are not here")
    network: str
    kind: str
    licence: str = Field(description="of the weights")
    commercial_use: bool = Field(description="whether the licence permits it")
    permitted: bool = Field(
        description="false where the licence forbids commercial use and the service does not say that its use is none"
    )
    dim: int
    input_shape: list[int] = Field(
        description="(windows, rows, columns) of a slice, (1, slices, rows, columns) of a volume"
    )
    windows: list[EncoderWindow]
    precision: str
    runtime: str
    default: bool
    weights_present: bool
    source: str = Field(description="where its weights come from")
    how_to_get: str


class Encoders(Schema):
    encoders: list[Encoder]


class Health(Schema):
    status: Literal["ok"]
    version: str


class Readiness(Schema):
    status: Literal["ready", "not_ready"]
    catalog: bool
    broker: bool
    embedded_seconds_ago: float | None = Field(description="since a worker last embedded a slice, the canary included")
    canary_cosine: float | None = Field(description="of the canary's embedding to its first one")
