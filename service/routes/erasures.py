"""Erasure: out of every store, with a receipt."""

from typing import Annotated

from fastapi import APIRouter, Depends

from service.audited import who
from service.deps import CallerDep, QueueDep, RecorderDep, SettingsDep, StoresDep, needs
from service.erasing import Eraser
from service.schemas.base import Text
from service.schemas.erasures import Erasure

router = APIRouter(prefix="/v1", tags=["erasures"])


def eraser(
    stores: StoresDep, queue: QueueDep, settings: SettingsDep, caller: CallerDep, recorder: RecorderDep
) -> Eraser:
    recorder.flush()  # while the catalog can still say whose data was read
    return Eraser(stores, queue, settings, who(caller))


EraserDep = Annotated[Eraser, Depends(eraser)]


@router.delete("/series/{series_uid}", dependencies=[needs("admin")])
def erase_series(series_uid: Text, eraser: EraserDep) -> Erasure:
    """Erase a series from every store; the answer is the receipt.

    503 where something holds it for a minute: it is out of sight, and the service goes on by itself.
    """
    return Erasure.model_validate(eraser.series(series_uid))


@router.delete("/patients/{patient_id:path}", dependencies=[needs("admin")])
def erase_patient(patient_id: Text, eraser: EraserDep) -> Erasure:
    """Erase a patient with every series; as DELETE of a series."""
    return Erasure.model_validate(eraser.patient(patient_id))


@router.get("/erasures/{erasure_id}", dependencies=[needs("read")])
def get_erasure(erasure_id: Text, stores: StoresDep) -> Erasure:
    """The receipt of an erasure, once more."""
    return Erasure.model_validate(stores.erasures.get(erasure_id))
