"""What routes ask for."""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated

from fastapi import Depends, Request

from models.heads.run import HeadRunner
from models.specs import ENCODERS, EncoderSpec, MissingWeights, WrongWeights, encoder_id
from service.errors import EncoderNotFound, OtherEncoder, WeightsNotHere
from service.queue import Queue
from service.settings import Settings
from service.storage.stores import Stores

HEADS_IN_MEMORY = 16


class EncoderNames:
    """Names and ids that callers may use for an encoder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def spec(self, name: str | None) -> EncoderSpec:
        """By name or id; the service's own for None. Raises EncoderNotFound."""
        asked = (name or self._settings.encoder).partition("@")[0]
        if asked not in ENCODERS:
            raise EncoderNotFound(f"no encoder {asked!r}, expected one of {', '.join(ENCODERS)}")
        return ENCODERS[asked]

    def id(self, name: str | None) -> str:
        """The present encoder id. Raises also WeightsNotHere, or OtherEncoder for an id that is not the present one."""
        spec = self.spec(name)
        try:
            present = encoder_id(spec, self._settings.weights_path)
        except (MissingWeights, WrongWeights) as error:
            raise WeightsNotHere(str(error)) from error
        if name and "@" in name and name != present:
            raise OtherEncoder(f"encoder {name} is not here, this service has {present}")
        return present


def cached_heads(stores: Stores) -> Callable[[str], HeadRunner]:
    """Heads by id, loaded once: a trained head never changes."""

    @lru_cache(HEADS_IN_MEMORY)
    def load(head_id: str) -> HeadRunner:
        graph = stores.heads.ready(head_id).graph
        assert graph is not None  # a ready head has one
        return HeadRunner(graph)

    return load


def stores(request: Request) -> Stores:
    found: Stores = request.state.stores
    return found


def settings(request: Request) -> Settings:
    found: Settings = request.state.settings
    return found


def queue(request: Request) -> Queue:
    found: Queue = request.state.queue
    return found


def encoders(request: Request) -> EncoderNames:
    found: EncoderNames = request.state.encoders
    return found


def heads(request: Request) -> Callable[[str], HeadRunner]:
    found: Callable[[str], HeadRunner] = request.state.heads
    return found


StoresDep = Annotated[Stores, Depends(stores)]
SettingsDep = Annotated[Settings, Depends(settings)]
QueueDep = Annotated[Queue, Depends(queue)]
EncodersDep = Annotated[EncoderNames, Depends(encoders)]
HeadsDep = Annotated[Callable[[str], HeadRunner], Depends(heads)]
