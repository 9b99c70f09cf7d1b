"""What crosses the wire: requests and answers, each once."""

from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.ct.screening import Reason
from models.heads.options import Baseline, Network, Protocol, Task
from service.dicom_out.peers import AE_TITLE

State = Literal["received", "queued", "embedding", "embedded", "indexed", "rejected", "failed"]
HeadState = Literal["received", "queued", "training", "ready", "failed", "cancelled"]
DicomKind = Literal["key_objects", "report"]
JobState = Literal["waiting", "running", "done", "failed", "cancelled"]

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
    weight: float = Field(description="the mean over the folds")
    weight_std: float = Field(description="standard deviation over the folds")


class TopSlice(SlicePosition):
    series_uid: str
    weight: float = Field(description="summed over the windows, the mean over the folds")
    weight_std: float = Field(description="standard deviation over the folds")


class LabelFaithfulness(Schema):
    whole: float = Field(description="probability with every instance")
    without_top: float = Field(description="probability without the instances of the largest weight")
    without_random: float = Field(description="probability without as many random ones, the mean over the draws")
    without_random_std: float = Field(description="standard deviation over the draws")


class Faithfulness(Schema):
    removed: int = Field(description="instances left out at a time")
    instances: int
    draws: int
    seed: int
    labels: dict[str, LabelFaithfulness]


class Explanation(Schema):
    """What every answer of a head carries beside its numbers."""

    head_id: str
    head_name: str
    head_version: int
    encoder_id: str
    window_share: dict[str, float] = Field(description="of the attention; sums to 1")
    window_share_std: dict[str, float] = Field(description="standard deviation over the folds")
    top_slices: list[TopSlice]
    key_slices: list[TopSlice] = Field(description="the heaviest of which no two of a series lie close together")
    faithfulness: Faithfulness | None = Field(description="null for a bag of one instance")


class Attention(Explanation):
    series_uid: str
    labels: list[str]
    instances: list[Instance] = Field(description="every slice at every window; weights sum to 1")


class Predictions(Explanation):
    prediction_id: str = Field(description="GET /v1/predictions/{prediction_id} gives the same answer for good")
    patient_id: str
    probabilities: dict[str, float]
    probabilities_std: dict[str, float] = Field(description="standard deviation over the folds")
    series: list[str] = Field(description="the series whose bags were read together")
    bags: dict[str, str] = Field(description="by series: the digest of the instances that its bag was made from")


class HeatMap(Schema):
    series_uid: str
    slice: int
    sop_uid: str
    z_mm: float
    window: str
    label: str
    head_id: str
    encoder_id: str
    weight: float = Field(description="the head's attention to this slice at this window, the mean over the folds")
    method: Literal["decomposition", "gradient"]
    cells: list[list[float]] = Field(
        description="evidence for the label in log-odds, over the whole slice; rows from top to bottom"
    )


class CStoreAddress(BaseModel):
    """A C-STORE SCP."""

    model_config = ConfigDict(extra="forbid")

    host: Text
    port: int = Field(ge=1, le=65535)
    called_ae: str = Field(pattern=AE_TITLE)
    calling_ae: str = Field("KEYSLICE", pattern=AE_TITLE)


class DicomPeer(BaseModel):
    """One of the two: a STOW-RS URL or a C-STORE SCP, that KEYSLICE_DICOM_PEERS names."""

    model_config = ConfigDict(extra="forbid")

    stow: str | None = Field(None, min_length=1, max_length=2000, description="the URL that is posted to")
    c_store: CStoreAddress | None = None

    @model_validator(mode="after")
    def _one(self) -> "DicomPeer":
        if (self.stow is None) == (self.c_store is None):
            raise ValueError("expected either stow or c_store")
        return self


class DicomOut(BaseModel):
    """Which documents of a head's prediction go where."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"head": "0123456789ab", "to": {"stow": "https://pacs.example/dicom-web/studies"}}]
        },
    )

    head: Text
    kinds: list[DicomKind] = Field(["key_objects", "report"], min_length=1, max_length=2)
    to: DicomPeer


class DicomSent(Schema):
    kind: DicomKind
    sop_class_uid: str
    sop_instance_uid: str
    status: int = Field(description="DICOM status: 0 stored, 0xB000 to 0xBFFF stored with a warning, else refused")


class DicomOutDone(Schema):
    series_uid: str
    head_id: str
    sent: list[DicomSent]


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

    name: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="of which this head is the next version; its own id where unset",
    )
    labels: UploadFile = Field(
        description="CSV: patient_id, study_uid or series_uid, then a column per label of 0, 1 and empty for unknown; "
        "a column split of train, validation and test where some are"
    )
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    task: Task = Field("multilabel", description="one_of_n has exactly one 1 per row, binary one label column")
    network: Network = "abmil"
    protocol: Protocol = Field("kfold", description="of a table without a split column")
    folds: int = Field(5, ge=2, le=50, description="fewer where a class has fewer patients")
    inner_folds: int = Field(5, ge=2, le=50, description="of nested: in each outer fold, and of the deployed head")
    epochs: int = Field(32, ge=1, le=10_000)
    patience: int = Field(8, ge=1, le=10_000, description="epochs without improvement of the validation loss")
    batch_size: int = Field(128, ge=1, le=4096, description="bags")
    learning_rate: float = Field(1e-4, gt=0, le=1)
    weight_decay: float = Field(1e-2, ge=0, le=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    hidden: int = Field(256, ge=1, le=4096, description="size of an instance behind the first layer")
    attention: int = Field(256, ge=1, le=4096, description="size of the attention's hidden layer")
    temperature_scaling: bool = Field(True, description="false leaves probabilities as the network gives them")
    specificity: float = Field(0.9, gt=0, lt=1, description="at which sensitivity is told")
    baselines: list[Baseline] = Field([], max_length=5, description="heads to train beside it on the same splits")
    permutations: int | None = Field(
        None, ge=0, le=100, description="trainings on shuffled labels; 1 for up to 100 patients where unset, else 0"
    )
    splits_of: Text | None = Field(None, description="a head whose splits are used again, patient by patient")
    seed: int = Field(0, ge=0, lt=2**31)


class TableWarning(Schema):
    """What of the labels table was left out."""

    code: Literal["not_here", "not_embedded", "no_label"]
    detail: str
    lines: list[int] = Field(description="of the table; the header is line 1")


class HeadAccepted(Schema):
    job_id: str
    head_id: str
    warnings: list[TableWarning]


class Difference(Schema):
    """Of a metric: one head, the other, and the first minus the second."""

    a: float
    b: float
    difference: float
    interval_95: tuple[float, float] | None = Field(description="patient-level bootstrap")
    p: float | None = Field(description="two-sided, by the bootstrap")


class DeLong(Schema):
    """DeLong's test of two AUROCs on the same patients."""

    a: float
    b: float
    difference: float
    interval_95: tuple[float, float]
    z: float
    p: float = Field(description="two-sided")


class LabelComparison(Schema):
    bags: int
    patients: int
    auroc: Difference
    auprc: Difference
    f1: Difference
    brier: Difference
    delong: DeLong | None = Field(description="null where patients have several rows or a class has a single one")


class HeadComparison(Schema):
    head_id: str
    other_head_id: str
    evaluated: Literal["test", "validation"]
    labels: dict[str, LabelComparison | None] = Field(description="null for a label with one class")


class Head(Schema):
    head_id: str
    name: str
    version: int
    promoted: bool = Field(description="whether the name alone means this version")
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
