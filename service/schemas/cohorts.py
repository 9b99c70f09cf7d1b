"""Which series: by what is known of them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from service.schemas.base import Text
from service.schemas.series import State
from service.storage.cohorts import CohortFilter

DATE = r"^\d{4}-?\d{2}-?\d{2}$"
Words = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00]*$")]


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

    def chosen(self, within: Sequence[str] = ()) -> CohortFilter:
        """With `within` only series that have one of these tags."""
        return CohortFilter(
            within=tuple(within),
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


class SeriesQuery(CohortQuery):
    text: Words = Field(
        "",
        description="words, each somewhere in patient id, UIDs, accession number, date, modality, body part, "
        "manufacturer, model, kernel, protocol, descriptions or tags, whatever its case",
    )
    tag: list[Text] = Field([], description="may be repeated: all of them")
    state: State | None = Field(None, description="of the embedding last asked for")
    cursor: Text | None = Field(None, description="next_cursor of the page before")
    limit: int = Field(100, ge=1, le=1000)
