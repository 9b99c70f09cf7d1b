"""The encoders this service knows."""

from dataclasses import asdict

from fastapi import APIRouter

from models.specs import ENCODERS, EncoderSpec, how_to_get
from service.deps import EncoderNames, EncodersDep, SettingsDep
from service.errors import WeightsNotHere
from service.schemas import Encoder, Encoders

router = APIRouter(prefix="/v1/encoders", tags=["encoders"])


@router.get("")
def list_encoders(encoders: EncodersDep, settings: SettingsDep) -> Encoders:
    """Every encoder with its windows, licence and id, and how to get weights that are not here."""
    return Encoders(encoders=[_encoder(spec, encoders, settings.encoder) for spec in ENCODERS.values()])


def _encoder(spec: EncoderSpec, encoders: EncoderNames, default: str) -> Encoder:
    try:
        encoder_id = encoders.id(spec.name)
    except WeightsNotHere:
        encoder_id = None
    return Encoder(
        **asdict(spec),
        encoder_id=encoder_id,
        default=spec.name == default,
        weights_present=encoder_id is not None,
        how_to_get=how_to_get(spec),
    )
