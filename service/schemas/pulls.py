"""What is asked of a PACS."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from models.ct.reasons import UID
from service.schemas.base import Sent

# Text of a matching key: no backslash, which would begin another value, and no control characters (PS3.5 6.2).
Key = Annotated[str, StringConstraints(strip_whitespace=True, max_length=64, pattern=r"^[^\x00-\x1f\x7f\\]*$")]
Day = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^(\d{8})?$")]


class PacsQuery(Sent):
    """Series by what the PACS knows of them; what is empty does not narrow the search, and something must."""

    model_config = ConfigDict(frozen=True)

    patient_id: Key = Field("", description="PatientID; `*` and `?` are the PACS's wildcards")
    study_uid: Key = Field("", description="StudyInstanceUID")
    accession_number: Key = Field("", description="AccessionNumber")
    date_from: Day = Field("", description="StudyDate, YYYYMMDD")
    date_to: Day = Field("", description="StudyDate, YYYYMMDD")
    modality: Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"^[A-Z0-9_ ]{0,16}$")] = Field(
        "CT", description="Modality of the series; of others nothing would be embedded"
    )

    @model_validator(mode="after")
    def _narrow(self) -> Self:
        if not (self.patient_id or self.study_uid or self.accession_number or self.date_from or self.date_to):
            raise ValueError("expected a patient_id, study_uid, accession_number, date_from or date_to")
        if self.study_uid and not UID.fullmatch(self.study_uid):
            raise ValueError("study_uid is not a UID of at most 64 digits and dots")
        if self.date_from and self.date_to and self.date_from > self.date_to:
            raise ValueError("date_from is after date_to")
        return self


class BadRow(BaseModel):
    """A row of a table of queries that asks nothing sensible."""

    line: int = Field(description="of the table, counted from 1; the header is line 1")
    detail: str = Field(description="what was expected; no cell is quoted, for they name patients")
