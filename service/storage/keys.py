"""The name of an embedding, in every store."""

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class EmbeddingKey:
    series_uid: str
    encoder_id: str  # name@fingerprint: see EncoderSpec
