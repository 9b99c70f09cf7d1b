"""What calls may be given by name; the contract test holds each against the service's own schema."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from models.heads.options import Baseline, Network, Task
from models.heads.options import Protocol as Validation
from service.schemas.search import Exclude, Filters, SliceQuery


class OfJob(Protocol):
    """What a call answered that began some work."""

    job_id: str


class OfHead(Protocol):
    head_id: str


JobLike: TypeAlias = str | OfJob
HeadLike: TypeAlias = str | OfHead


class Table(Protocol):
    """A pandas DataFrame, among others."""

    def to_csv(self, *, index: bool) -> Any: ...


Labels: TypeAlias = str | Path | bytes | Table


class Explaining(TypedDict, total=False):
    remove: float  # share of the instances that faithfulness removes
    draws: int  # of as many random instances
    seed: int  # of the draws
    apart_mm: float  # along the body, between key slices of a series


class Training(TypedDict, total=False):
    """docs/heads.md says what each does; what is left out is as the paper has it."""

    name: str
    encoder: str
    task: Task
    network: Network
    protocol: Validation
    folds: int
    inner_folds: int
    epochs: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    dropout: float
    hidden: int
    attention: int
    temperature_scaling: bool
    specificity: float
    baselines: Sequence[Baseline]
    permutations: int
    splits_of: str
    seed: int


class Searching(TypedDict, total=False):
    k: int
    match: Literal["same", "any", "fused"]
    collapse: Literal["none", "series"]
    exclude: Exclude
    filters: Filters | Mapping[str, Any]
    exact: bool
    slices: Sequence[SliceQuery | Mapping[str, Any]]
    combine: Literal["best", "mean"]
    vector: Sequence[float]
    encoder: str


class SearchingImage(TypedDict, total=False):
    window: str
    k: int
    match: Literal["same", "any", "fused"]
    collapse: Literal["none", "series"]
    filters: Filters | Mapping[str, Any]
    exact: bool


class SearchingSeries(TypedDict, total=False):
    by: Literal["mean", "attention", "late"]
    head: str
    encoder: str
    k: int
    shortlist: int
    exclude: Literal["series", "study", "patient"]
    filters: Filters | Mapping[str, Any]


class Cohort(TypedDict, total=False):
    """Every condition that is set must hold; of a list, any of its values."""

    patient_id: str | Sequence[str]
    study_uid: str | Sequence[str]
    series_uid: str | Sequence[str]
    date_from: str
    date_to: str
    modality: str
    body_part: str
    manufacturer: str
    kernel: str
    verdict: Literal["accepted", "accepted_with_warnings", "rejected"]
    encoder: str
    window: str | Sequence[str]
    patients: Literal["key", "id"]
