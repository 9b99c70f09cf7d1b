"""The encoders this service knows."""

from dataclasses import asdict

from fastapi import APIRouter

from models.specs import how_to_get
from service.deps import EncoderNames, EncodersDep, SettingsDep, needs
from service.errors import WeightsNotHere
from service.schemas.encoders import Encoder, Encoders
from service.settings import Settings

router = APIRouter(prefix="/v1/encoders", tags=["encoders"], dependencies=[needs("read", narrows=True)])


@router.get("")
def list_encoders(encoders: EncodersDep, settings: SettingsDep) -> Encoders:
    """Every encoder with its windows, licence and id, and how to get weights that are not here."""
    return described(encoders, settings)


def described(encoders: EncoderNames, settings: Settings) -> Encoders:
    return Encoders(encoders=[_encoder(name, encoders, settings) for name in encoders.known()])


def _encoder(name: str, encoders: EncoderNames, settings: Settings) -> Encoder:
    spec = encoders.spec(name)
    try:
        encoder_id = encoders.present_id(spec)
    except WeightsNotHere:
        encoder_id = None
    return Encoder(
        **asdict(spec),
        input_shape=list(spec.input_shape),
        encoder_id=encoder_id,
        default=name == settings.encoder,
        weights_present=encoder_id is not None,
        source=f"{spec.weights.source} {spec.weights.locator}",
        how_to_get=how_to_get(spec),
        permitted=spec.commercial_use or settings.noncommercial,
    )
