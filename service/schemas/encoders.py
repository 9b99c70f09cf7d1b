"""Encoders."""

from pydantic import Field

from service.schemas.base import Schema


class EncoderWindow(Schema):
    name: str
    low: float = Field(description="HU")
    high: float = Field(description="HU")


class Encoder(Schema):
    name: str
    encoder_id: str | None = Field(description="null where the weights are not here")
    network: str
    kind: str
    licence: str = Field(description="of the weights")
    commercial_use: bool = Field(description="whether the licence permits it")
    permitted: bool = Field(
        description="false where the licence forbids commercial use and the service does not say that its use is none"
    )
    dim: int
    input_shape: list[int] = Field(
        description="(windows, rows, columns) of a slice, (1, slices, rows, columns) of a volume"
    )
    windows: list[EncoderWindow]
    precision: str
    runtime: str
    default: bool
    weights_present: bool
    source: str = Field(description="where its weights come from")
    how_to_get: str


class Encoders(Schema):
    encoders: list[Encoder]
