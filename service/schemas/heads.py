"""Heads: training, versions, comparison."""

from datetime import datetime
from typing import Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from models.heads.options import Baseline, Network, Protocol, Task
from service.schemas.base import Schema, Text

HeadState = Literal["received", "queued", "training", "ready", "failed", "cancelled"]


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
