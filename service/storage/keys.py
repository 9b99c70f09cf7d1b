"""The names of an embedding and of a heat map, in every store."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, order=True)
class EmbeddingKey:
    series_uid: str
    encoder_id: str  # name@fingerprint: see EncoderSpec


@dataclass(frozen=True)
class HeatSpot:
    """Where a heat map looks: a slice at a window, as a head sees it for a label."""

    series_uid: str
    content: str  # of the bag that the slice is numbered in
    head_id: str
    slice: int
    window: str
    label: str

    def words(self) -> tuple[str, ...]:
        """The fields in order, as a message carries them."""
        return tuple(map(str, asdict(self).values()))
