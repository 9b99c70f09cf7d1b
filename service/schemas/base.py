"""What every message shares."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

# Text that a database and an index can hold; PostgreSQL refuses NUL.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class Schema(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Sent(BaseModel):
    """What a caller sends: no field that is not of it."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_more_than_there_are(cls, fields: Any) -> Any:
        # pydantic describes each that is too many: a megabyte of them would take a hundred.
        if isinstance(fields, dict) and len(fields) > len(cls.model_fields):
            raise ValueError(f"{len(fields)} fields, expected at most {len(cls.model_fields)}")
        return fields


class Problem(BaseModel):
    """RFC 9457: what went wrong, what was found and what was expected."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:keyslice:series-not-found"])
    title: str
    status: int
    detail: str
