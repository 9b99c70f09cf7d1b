"""Similar slices."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.schemas.base import Schema, Text
from service.schemas.series import SlicePosition


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
