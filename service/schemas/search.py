"""Similar slices and similar series."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from service.schemas.base import Schema, Sent, Text
from service.schemas.series import SlicePosition

Exclude = Literal["none", "series", "study", "patient"]
Verdict = Literal["accepted", "accepted_with_warnings", "rejected"]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00,]+$", strip_whitespace=True)]
Date = Annotated[str, StringConstraints(pattern=r"^\d{8}$")]

MOST_SLICES = 32  # of one query
MOST_VALUES = 1000  # of one filter


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ManyTexts = Annotated[list[Text], Field(max_length=MOST_VALUES)]
ManyTags = Annotated[list[Tag], Field(max_length=100)]
SomeTexts = Annotated[ManyTexts, BeforeValidator(_listed, json_schema_input_type=Text | ManyTexts)]
SomeTags = Annotated[ManyTags, BeforeValidator(_listed, json_schema_input_type=Tag | ManyTags)]
ManyVerdicts = Annotated[list[Verdict], Field(max_length=3)]
SomeVerdicts = Annotated[ManyVerdicts, BeforeValidator(_listed, json_schema_input_type=Verdict | ManyVerdicts)]


class Filters(Sent):
    """What a series must be for its slices to be hits: of a list one must fit, and all filters together."""

    series_uid: SomeTexts = Field([])
    study_uid: SomeTexts = Field([])
    patient_id: SomeTexts = Field([])
    modality: SomeTexts = Field([])
    body_part: SomeTexts = Field([])
    manufacturer: SomeTexts = Field([], description="as the header has it")
    kernel: SomeTexts = Field([], description="as the header has it")
    verdict: SomeVerdicts = Field([])
    tags: SomeTags = Field([], description="all of them")
    spacing_from_mm: float | None = Field(None, ge=0, allow_inf_nan=False)
    spacing_to_mm: float | None = Field(None, ge=0, allow_inf_nan=False)
    date_from: Date | None = Field(None, description="StudyDate, YYYYMMDD")
    date_to: Date | None = Field(None, description="StudyDate, YYYYMMDD")


class SliceQuery(Sent):
    """A stored slice; the window may be left out where all of them count."""

    series_uid: Text
    slice: int = Field(ge=0, le=2**31 - 1)
    window: Text | None = None


class SearchOptions(Sent):
    """How to search, whatever is searched by."""

    k: int = Field(10, ge=1)
    match: Literal["same", "any", "fused"] = Field(
        "same", description="hits at the query's own window, at any, or slices by their mean cosine over all windows"
    )
    collapse: Literal["none", "series"] = Field("none", description="series: one hit per series, its best slice")
    filters: Filters = Filters()
    exact: bool = Field(False, description="read every row, whatever the index")


class ImageSearchRequest(SearchOptions):
    """With an uploaded slice."""

    window: Text | None = Field(None, description="that counts; needed for a PNG, which shows one window")


class SearchRequest(SearchOptions):
    """Either a stored slice at a window, or several, or a vector and the encoder it is of."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"series_uid": "1.2.3", "slice": 70, "window": "lung", "k": 5, "exclude": "patient"}]
        },
    )

    series_uid: Text | None = None
    slice: int | None = Field(None, ge=0, le=2**31 - 1)
    window: Text | None = Field(None, description="of the stored slice, and of the hits; any for a vector where unset")
    slices: list[SliceQuery] | None = Field(None, min_length=1, max_length=MOST_SLICES)
    combine: Literal["best", "mean"] = Field("best", description="of several slices' cosines to a hit")
    vector: list[float] | None = Field(None, max_length=65536)
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    exclude: Exclude = Field("none", description="slices of the query's own series, studies or patients")

    @model_validator(mode="after")
    def _one_kind(self) -> "SearchRequest":
        single = self.series_uid is not None or self.slice is not None
        if (single, self.slices is not None, self.vector is not None).count(True) != 1:
            raise ValueError("expected one of: series_uid, slice and window together; slices; vector and encoder")
        if self.vector is not None:
            if self.encoder is None:
                raise ValueError("a vector needs the encoder it is of")
            if self.exclude != "none":
                raise ValueError("exclude needs a stored slice, a vector has no series")
            if self.match == "fused":
                raise ValueError("fused needs a slice at every window, a vector is of one")
        elif any(each.window is None for each in self.queries) and self.match == "same":
            raise ValueError("expected a window for every slice, or match any or fused")
        return self

    @property
    def queries(self) -> list[SliceQuery]:
        """The stored slices asked about. Raises ValueError where one is half told."""
        if self.slices is not None:
            return self.slices
        if self.vector is not None:
            return []
        if self.series_uid is None or self.slice is None:
            raise ValueError("expected series_uid, slice and window together, or vector and encoder")
        return [SliceQuery(series_uid=self.series_uid, slice=self.slice, window=self.window)]


class Hit(SlicePosition):
    series_uid: str
    window: str = Field(description="`fused` where all of them count")
    patient_id: str
    score: float = Field(description="cosine")


class Effort(Schema):
    nprobes: int = Field(description="partitions read")
    refine: int = Field(description="exact cosines per hit asked for")


class SearchAnswer(Schema):
    hits: list[Hit]
    encoder_id: str
    index: Literal["IVF_RQ", "exact", "bags"] = Field(description="bags: the index is being made anew")
    recall: float = Field(description="at 10 against exact search, measured on stored vectors; 1 where it was exact")
    effort: Effort | None = Field(description="of an ANN index")
    note: str | None = Field(description="why not as usual")


class SeriesSearchRequest(Sent):
    """Series like this one."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"series_uid": "1.2.3", "k": 5}]})

    series_uid: Text
    by: Literal["mean", "attention", "late"] = Field(
        "mean",
        description="cosine of mean vectors, or of slices weighted by a head's attention; late: the mean over the "
        "series' slices of the best match at their window, for the `shortlist` nearest by mean",
    )
    head: Text | None = Field(None, description="for attention")
    encoder: Text | None = Field(None, description="name or id; the service's own, or the head's, where unset")
    k: int = Field(10, ge=1)
    shortlist: int = Field(50, ge=1, le=500)
    exclude: Literal["series", "study", "patient"] = "series"
    filters: Filters = Filters()

    @model_validator(mode="after")
    def _head_for_attention(self) -> "SeriesSearchRequest":
        if (self.by == "attention") != (self.head is not None):
            raise ValueError("a head belongs to attention, and attention needs one")
        return self


class SeriesHit(Schema):
    series_uid: str
    study_uid: str
    patient_id: str
    slices: int
    score: float


class SeriesSearchAnswer(Schema):
    hits: list[SeriesHit]
    encoder_id: str
    by: str
    compared: int = Field(description="series whose vectors were compared")


class TagList(Sent):
    tags: list[Tag] = Field(max_length=100)
