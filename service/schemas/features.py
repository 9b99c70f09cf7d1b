"""Features to take away: which, and how."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.features.names import FormatName
from service.schemas.base import Text
from service.storage.cohorts import CohortFilter

DRAWN, MOST_DRAWN = 2000, 5000  # instances of a sample: a page holds so many pictures, and t-SNE stays quick
DATE = r"^\d{4}-?\d{2}-?\d{2}$"


class CohortQuery(BaseModel):
    """Every condition that is set must hold; of one given several times, any of its values."""

    model_config = ConfigDict(extra="forbid")

    patient_id: list[Text] = Field([], description="may be repeated")
    study_uid: list[Text] = Field([], description="may be repeated")
    series_uid: list[Text] = Field([], description="may be repeated")
    date_from: str | None = Field(None, pattern=DATE, description="of the study, 2001-01-31 or 20010131")
    date_to: str | None = Field(None, pattern=DATE, description="of the study, that day included")
    modality: Text | None = None
    body_part: Text | None = None
    manufacturer: Text | None = None
    kernel: Text | None = None
    verdict: Literal["accepted", "accepted_with_warnings", "rejected"] | None = None

    def chosen(self) -> CohortFilter:
        return CohortFilter(
            patient_id=tuple(self.patient_id),
            study_uid=tuple(self.study_uid),
            series_uid=tuple(self.series_uid),
            date_from=self.date_from and self.date_from.replace("-", ""),
            date_to=self.date_to and self.date_to.replace("-", ""),
            modality=self.modality,
            body_part=self.body_part,
            manufacturer=self.manufacturer,
            kernel=self.kernel,
            verdict=self.verdict,
        )


class EmbeddedQuery(CohortQuery):
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    window: list[Text] = Field([], description="may be repeated; all of them where unset")
    patients: Literal["key", "id"] = Field("key", description="what stands for a patient: an opaque key, or the id")


class FeatureQuery(EmbeddedQuery):
    format: FormatName = Field("parquet", description="docs/features.md has each")


class SampleQuery(EmbeddedQuery):
    count: int = Field(DRAWN, ge=1, le=MOST_DRAWN, description="instances to draw")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="the same one draws the same instances")
