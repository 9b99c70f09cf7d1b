"""A series' embeddings: JSON to look at, .npy, Arrow or HDF5 to work with."""

import io
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Query, Response

from service.deps import EncodersDep, StoresDep, needs
from service.errors import BagGone
from service.features.bags import FeatureBag, read_bag
from service.features.stamp import stamp_file
from service.features.tables import arrow
from service.routes.features import of_one_series
from service.schemas.base import Text
from service.schemas.series import Embeddings, SlicePosition
from service.storage.bags import slices_of
from service.storage.keys import EmbeddingKey

router = APIRouter(prefix="/v1/series", tags=["embeddings"], dependencies=[needs("read")])

NPY = "application/x-npy"
ARROW = "application/vnd.apache.arrow.stream"
HDF5 = "application/x-hdf5"
BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "/{series_uid}/embeddings",
    response_model=Embeddings,
    responses={200: {"content": dict.fromkeys((NPY, ARROW, HDF5), BINARY)}},
)
def get_embeddings(
    series_uid: Text,
    stores: StoresDep,
    encoders: EncodersDep,
    encoder: Annotated[Text | None, Query(description="name or id; the service's own where unset")] = None,
    window: Annotated[Text | None, Query(description="one window; all of them where unset")] = None,
    accept: Annotated[str, Header()] = "application/json",
) -> Any:
    """(slices, windows, dim), feet to head, with each slice's SOPInstanceUID and position."""
    encoder_id = encoders.id(encoder)
    stores.catalog.embedding(series_uid, encoder_id)
    member = stores.cohorts.member(EmbeddingKey(series_uid, encoder_id))
    bag = read_bag(member, None if window is None else [window], stores) if member else None
    if bag is None:
        raise BagGone(f"the embeddings of series {series_uid} went while they were asked for")
    for media_type in (NPY, ARROW, HDF5):
        if media_type in accept:
            names = {"X-Keyslice-Encoder": encoder_id, "X-Keyslice-Windows": ",".join(bag.windows)}
            return Response(_file(bag, media_type, encoder_id), media_type=media_type, headers=names)
    return Embeddings(
        series_uid=series_uid,
        encoder_id=encoder_id,
        windows=[*bag.windows],
        dim=bag.vectors.shape[2],
        slices=[SlicePosition(**each) for each in slices_of(bag.receipt)],
        embeddings=bag.vectors.tolist(),
        receipt=bag.receipt,
    )


def _file(bag: FeatureBag, media_type: str, encoder_id: str) -> bytes:
    dim = bag.vectors.shape[2]
    said = of_one_series(encoder_id, [*bag.windows], dim)
    if media_type == ARROW:
        return b"".join(arrow([bag], said, dim, Path()))
    if media_type == HDF5:
        return stamp_file(bag, said)
    content = io.BytesIO()
    np.save(content, bag.vectors)
    return content.getvalue()
