"""Heads: training, versions, comparison."""

from datetime import datetime
from typing import Any, Literal

from pydantic import Field

from service.schemas.base import Schema

HeadState = Literal["received", "queued", "training", "ready", "failed", "cancelled"]


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
