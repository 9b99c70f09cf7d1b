"""What a head said of some bags, as the documents tell it."""

import hashlib
from dataclasses import dataclass
from datetime import datetime

from service.explanations import Explained
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

VERSION_LENGTH = 12  # hex digits, as in an encoder's id


@dataclass(frozen=True)
class TopImage:
    """An image, or a frame of one, with its slice's attention."""

    series_uid: str
    sop_uid: str
    frame: int | None  # from 1, as ReferencedFrameNumber counts (PS3.3 10.3)
    attention: float


@dataclass(frozen=True)
class Outcome:
    """One prediction with everything that it follows from; the same request gives the same one."""

    head_id: str
    head_version: str  # the first digits of the SHA-256 of its weights
    encoder_id: str
    windows: tuple[str, ...]
    probabilities: dict[str, float]  # label -> 0..1
    instances: tuple[tuple[str, str], ...]  # (series UID, SOP Instance UID) of every image that was read, once
    top: tuple[TopImage, ...]  # the highest attention first
    bags: tuple[tuple[str, str], ...]  # (series UID, content) of the bags
    made_at: datetime  # UTC: when the head was asked for or the last bag made, whichever is later


def outcome_of(explained: Explained, stores: Stores) -> Outcome:
    """The outcome of a head's reading of some bags.

    `top` is empty where the encoder embeds a volume as one: the slice that stands for it made nobody say anything.
    """
    head, bag = explained.head, explained.bag
    rows = [stores.catalog.embedding(series_uid, head.encoder_id) for series_uid in bag.contents]
    receipts = [
        stores.bags.receipt(EmbeddingKey(series_uid, head.encoder_id), content)
        for series_uid, content in bag.contents.items()
    ]
    volumes = any(receipt["kind"] == "volume3d" for receipt in receipts)
    top = [] if volumes else explained.top_slices()
    return Outcome(
        head_id=head.head_id,
        head_version=hashlib.sha256(stores.heads.weights(head.head_id)).hexdigest()[:VERSION_LENGTH],
        encoder_id=head.encoder_id,
        windows=tuple(bag.windows),
        probabilities=explained.probabilities,
        instances=tuple(dict.fromkeys((each["series_uid"], each["sop_uid"]) for each in bag.slices)),
        top=tuple(TopImage(each.series_uid, each.sop_uid, each.frame, each.weight) for each in top),
        bags=tuple(sorted(bag.contents.items())),
        made_at=max([head.created_at, *(row.embedded_at for row in rows if row.embedded_at)]),
    )
