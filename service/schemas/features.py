"""Features to take away: which, and how."""

from typing import Literal

from pydantic import Field

from service.features.names import FormatName
from service.schemas.base import Text
from service.schemas.cohorts import CohortQuery

DRAWN, MOST_DRAWN = 2000, 5000  # instances of a sample: a page holds so many pictures, and t-SNE stays quick


class EmbeddedQuery(CohortQuery):
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    window: list[Text] = Field([], description="may be repeated; all of them where unset")
    patients: Literal["key", "id"] = Field("key", description="what stands for a patient: an opaque key, or the id")


class FeatureQuery(EmbeddedQuery):
    format: FormatName = Field("parquet", description="docs/features.md has each")


class SampleQuery(EmbeddedQuery):
    count: int = Field(DRAWN, ge=1, le=MOST_DRAWN, description="instances to draw")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="the same one draws the same instances")
