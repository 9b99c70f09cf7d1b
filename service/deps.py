"""What routes ask for."""

from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer, SecurityScopes
from prometheus_client import CollectorRegistry
from starlette.concurrency import run_in_threadpool

from models.heads.run import HeadRunner, OtherGraph
from models.modes import by_id, in_mode
from models.specs import EncoderSpec, LicenceForbids, MissingWeights, WrongWeights, check_licence, encoder_id
from models.zoo import encoders as all_encoders
from service.audited import Shown
from service.auth import Caller
from service.disk import Room
from service.errors import (
    BeyondKey,
    EncoderNotFound,
    HeadNotReady,
    LicenceNotAccepted,
    OtherEncoder,
    ScopeMissing,
    WeightsNotHere,
)
from service.intake import require_turn
from service.queue import Queue
from service.recorder import Recorder
from service.settings import Settings
from service.storage.api_keys import Scope
from service.storage.stores import Stores

HEADS_IN_MEMORY = 16

# For the schema alone: service/auth.py has read the header before a route is looked for.
bearer = HTTPBearer(
    scheme_name="api_key",
    bearerFormat="ks_<id>_<secret>",
    description="A key of `keyslice keys create`, with one of the scopes listed. "
    "Not needed on loopback as long as no key was ever made.",
    auto_error=False,
)


class EncoderNames:
    """Names and ids that callers may use for an encoder."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def known(self) -> dict[str, EncoderSpec]:
        """Every encoder by name, eager in fp32; one exported a moment ago too."""
        return all_encoders(self._settings.weights_path)

    def spec(self, name: str | None) -> EncoderSpec:
        """By name or id, run as the service's mode says; the service's own for None. Raises EncoderNotFound."""
        asked = (name or self._settings.encoder).partition("@")[0]
        known = self.known()
        if asked not in known:
            raise EncoderNotFound(f"no encoder {asked!r}, expected one of {', '.join(known)}")
        try:
            return in_mode(known[asked], self._settings.mode, self._settings.weights_path)
        except (MissingWeights, WrongWeights):
            return known[asked]

    def present_id(self, spec: EncoderSpec) -> str:
        """The spec's id with the weights that are here. Raises WeightsNotHere."""
        try:
            return encoder_id(spec, self._settings.weights_path)
        except (MissingWeights, WrongWeights) as error:
            raise WeightsNotHere(str(error)) from error

    def id(self, name: str | None) -> str:
        """The encoder's id. Raises also LicenceNotAccepted, or OtherEncoder for an id that no weights here have."""
        spec = self.spec(name)
        try:
            check_licence(spec, self._settings.noncommercial)
        except LicenceForbids as error:
            raise LicenceNotAccepted(str(error)) from error
        present = self.present_id(spec)
        if name and "@" in name and name != present:
            if by_id(self.known()[spec.name], name, self._settings.weights_path) is None:
                raise OtherEncoder(f"encoder {name} is not here, this service has {present}")
            return name
        return present


def cached_heads(stores: Stores) -> Callable[[str], HeadRunner]:
    """Heads by id, loaded once: a trained head never changes."""

    @lru_cache(HEADS_IN_MEMORY)
    def load(head_id: str) -> HeadRunner:
        try:
            return HeadRunner(stores.heads.graph(head_id))
        except OtherGraph as error:
            raise HeadNotReady(
                f"head {head_id} was stored by an earlier version: train it again", state="ready"
            ) from error

    return load


def stores(request: Request) -> Stores:
    found: Stores = request.state.stores
    return found


def settings(request: Request) -> Settings:
    found: Settings = request.state.settings
    return found


StoresDep = Annotated[Stores, Depends(stores)]
SettingsDep = Annotated[Settings, Depends(settings)]


def queue(request: Request) -> Queue:
    found: Queue = request.state.queue
    return found


def encoders(request: Request) -> EncoderNames:
    found: EncoderNames = request.state.encoders
    return found


def heads(request: Request) -> Callable[[str], HeadRunner]:
    found: Callable[[str], HeadRunner] = request.state.heads
    return found


def metrics(request: Request) -> CollectorRegistry:
    found: CollectorRegistry = request.app.state.metrics
    return found


def room(request: Request, settings: SettingsDep) -> Room:
    """Where a body goes. Raises NoRoom where there is none for it, by its Content-Length if it has one."""
    length, found = request.headers.get("content-length", ""), Room.of(settings)
    found.require(int(length) if length.isdecimal() else 0)
    return found


def sender(request: Request, stores: StoresDep, settings: SettingsDep) -> str:
    """Whose a body is. Raises QueueFull where they have sent as many series as may wait."""
    name: str = request.state.caller.name
    require_turn(name, stores, settings)
    return name


async def shown(request: Request) -> Shown:
    found: Shown = request.state.shown
    return found


async def recorder(request: Request) -> Recorder:
    found: Recorder = request.state.recorder
    return found


async def caller(request: Request) -> Caller:
    found: Caller = request.state.caller
    return found


QueueDep = Annotated[Queue, Depends(queue)]
EncodersDep = Annotated[EncoderNames, Depends(encoders)]
HeadsDep = Annotated[Callable[[str], HeadRunner], Depends(heads)]
RoomDep = Annotated[Room, Depends(room)]
SenderDep = Annotated[str, Depends(sender)]
MetricsDep = Annotated[CollectorRegistry, Depends(metrics)]
ShownDep = Annotated[Shown, Depends(shown)]
RecorderDep = Annotated[Recorder, Depends(recorder)]
CallerDep = Annotated[Caller, Depends(caller)]


def needs(*scopes: Scope, narrows: bool = False) -> Any:
    """A dependency of a router or route: the caller has one of these scopes.

    A caller who sees only some series gets no further than to them: by the path of one of these, and where a route
    `narrows` what it answers to WithinDep.
    """
    return Security(_allowed if narrows else _allowed_there, scopes=list(scopes))


def within(caller: CallerDep) -> tuple[str, ...]:
    """The caller sees only series that have one of these tags; all where there are none."""
    return caller.tags


WithinDep = Annotated[tuple[str, ...], Depends(within)]


async def _allowed(needed: SecurityScopes, caller: CallerDep, _: Annotated[Any, Depends(bearer)]) -> None:
    if caller.scopes.isdisjoint(needed.scopes):
        found, expected = sorted(caller.scopes), needed.scopes
        raise ScopeMissing(
            f"{caller.name} has {', '.join(found) or 'no scope'}, expected {' or '.join(expected)}",
            scopes=found,
            needed=expected,
        )


async def _allowed_there(
    request: Request, caller: CallerDep, stores: StoresDep, _: Annotated[Any, Depends(_allowed)]
) -> None:
    if not caller.tags:
        return
    named = request.path_params.get("series_uid") or request.path_params.get("series")
    if named is None:
        raise BeyondKey("the key sees only series with its tags: ask for one of them by its UID, search, or list them")
    await run_in_threadpool(stores.tags.visible, named, caller.tags)
