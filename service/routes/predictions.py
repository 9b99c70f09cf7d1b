"""What a head says of a patient, and which slices made it say so."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from models.heads.explain import APART_MM, DRAWS, REMOVED_SHARE
from service.deps import HeadsDep, ShownDep, StoresDep, needs
from service.explanations import Explained, explain_again, explain_patient, explain_series
from service.schemas.base import Text
from service.schemas.predictions import Attention, Instance, Predictions

router = APIRouter(prefix="/v1", tags=["predictions"], dependencies=[needs("read")])


class Asked(BaseModel):
    """How to explain."""

    remove: float = Field(REMOVED_SHARE, gt=0, lt=1, description="share of the instances that faithfulness removes")
    draws: int = Field(DRAWS, ge=1, le=200, description="of as many random instances")
    seed: int = Field(0, ge=0, lt=2**31, description="of the draws")
    apart_mm: float = Field(APART_MM, ge=0, le=1e4, description="along the body, between key slices of a series")


AskedDep = Annotated[Asked, Depends()]


@router.get("/series/{series_uid}/attention")
def get_attention(
    series_uid: Text, head: Annotated[Text, Query()], stores: StoresDep, heads: HeadsDep, asked: AskedDep
) -> Attention:
    """The head's weight of every slice at every window of one series, and whether it is to be believed."""
    found = explain_series(stores, heads, head, series_uid)
    weights, spreads = found.reading.attention, found.attention_spread
    instances = [
        Instance(**each, window=window, weight=float(weights[k, w]), weight_std=float(spreads[k, w]))
        for k, each in enumerate(found.bag.slices)
        for w, window in enumerate(found.bag.windows)
    ]
    return Attention(series_uid=series_uid, labels=found.head.labels, instances=instances, **_explanation(found, asked))


@router.get("/patients/{patient_id:path}/predictions")
def get_predictions(
    patient_id: Text,
    head: Annotated[Text, Query()],
    stores: StoresDep,
    heads: HeadsDep,
    asked: AskedDep,
    shown: ShownDep,
    series_uid: Annotated[Text | None, Query()] = None,
    study_uid: Annotated[Text | None, Query()] = None,
) -> Predictions:
    """One probability per label, from all of the patient's accepted series together."""
    found = explain_patient(stores, heads, head, patient_id, series_uid=series_uid, study_uid=study_uid)
    shown.series(found.bag.contents)
    prediction_id = stores.predictions.note(found.head.head_id, found.bag.contents, asked.model_dump())
    return _predictions(prediction_id, patient_id, found, asked)


@router.get("/predictions/{prediction_id}")
def get_prediction(prediction_id: Text, stores: StoresDep, heads: HeadsDep, shown: ShownDep) -> Predictions:
    """A prediction once more: the same head on the same bags, whatever was trained, promoted or sent since."""
    row = stores.predictions.get(prediction_id)
    found = explain_again(stores, heads, row)
    shown.series(found.bag.contents)
    return _predictions(prediction_id, row.patient.patient_id, found, Asked(**row.asked))


def _predictions(prediction_id: str, patient_id: str, found: Explained, asked: Asked) -> Predictions:
    return Predictions(
        prediction_id=prediction_id,
        patient_id=patient_id,
        probabilities=found.probabilities,
        probabilities_std=found.probability_spread,
        series=[*found.bag.contents],
        bags=found.bag.contents,
        **_explanation(found, asked),
    )


def _explanation(found: Explained, asked: Asked) -> dict[str, Any]:
    return {
        "head_id": found.head.head_id,
        "head_name": found.head.name,
        "head_version": found.head.version,
        "encoder_id": found.head.encoder_id,
        "window_share": found.window_share,
        "window_share_std": found.window_share_spread,
        "top_slices": found.top_slices(),
        "key_slices": found.key_slices(apart_mm=asked.apart_mm),
        "faithfulness": found.faithfulness(asked.remove, asked.draws, asked.seed),
    }
