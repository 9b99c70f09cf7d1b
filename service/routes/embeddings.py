"""A series' embeddings: JSON to look at, .npy to work with."""

import io
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Header, Query, Response

from service.deps import EncodersDep, StoresDep
from service.errors import WindowNotFound
from service.schemas.base import Text
from service.schemas.series import Embeddings, SlicePosition
from service.storage.bags import slices_of
from service.storage.keys import EmbeddingKey

router = APIRouter(prefix="/v1/series", tags=["embeddings"])

NPY = "application/x-npy"


@router.get(
    "/{series_uid}/embeddings",
    response_model=Embeddings,
    responses={200: {"content": {NPY: {"schema": {"type": "string", "format": "binary"}}}}},
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
    row = stores.catalog.embedding(series_uid, encoder_id)
    key = EmbeddingKey(series_uid, encoder_id)
    bag, receipt = stores.bags.get(key, row.content or ""), stores.bags.receipt(key, row.content or "")
    windows: list[str] = receipt["windows"]
    if window is not None:
        if window not in windows:
            raise WindowNotFound(f"no window {window!r}, expected one of {', '.join(windows)}")
        bag, windows = bag[:, [windows.index(window)]], [window]
    if NPY in accept:
        content = io.BytesIO()
        np.save(content, bag)
        names = {"X-Keyslice-Encoder": encoder_id, "X-Keyslice-Windows": ",".join(windows)}
        return Response(content.getvalue(), media_type=NPY, headers=names)
    return Embeddings(
        series_uid=series_uid,
        encoder_id=encoder_id,
        windows=windows,
        dim=bag.shape[2],
        slices=[SlicePosition(**each) for each in slices_of(receipt)],
        embeddings=bag.tolist(),
        receipt=receipt,
    )
