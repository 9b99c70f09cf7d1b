"""What a head says, and which slices made it say so."""

from typing import Literal

from pydantic import Field

from service.schemas.base import Schema
from service.schemas.series import SlicePosition


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
    frame: int | None = Field(None, description="of a multi-frame instance, from 1")
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
