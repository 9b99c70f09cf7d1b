"""What every message shares."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

# Text that a database and an index can hold; PostgreSQL refuses NUL.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00]*$")]


class Schema(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Problem(BaseModel):
    """RFC 9457: what went wrong, what was found and what was expected."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(examples=["urn:keyslice:series-not-found"])
    title: str
    status: int
    detail: str
