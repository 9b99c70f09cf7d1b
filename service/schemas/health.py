"""Health and readiness."""

from typing import Literal

from pydantic import Field

from service.schemas.base import Schema


class Health(Schema):
    status: Literal["ok"]
    version: str


class Readiness(Schema):
    status: Literal["ready", "not_ready"]
    catalog: bool
    broker: bool
    bags: bool = Field(description="the place where bags lie can be reached")
    embedded_seconds_ago: float | None = Field(description="since a worker last embedded a slice, the canary included")
    canary_cosine: float | None = Field(description="of the canary's embedding to its first one")
