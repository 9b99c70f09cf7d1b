"""Is it alive, is it ready."""

from importlib.metadata import version

from fastapi import APIRouter, Response
from sqlalchemy.exc import SQLAlchemyError

from models.modes import COSINE
from service.deps import QueueDep, SettingsDep, StoresDep
from service.errors import BrokerDown
from service.schemas.health import Health, Readiness
from service.storage.tables import now

router = APIRouter(tags=["health"])

VERSION = version("keyslice")  # looked up among all installed packages: once


@router.get("/healthz")
def healthz() -> Health:
    """The process answers."""
    return Health(status="ok", version=VERSION)


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(response: Response, stores: StoresDep, queue: QueueDep, settings: SettingsDep) -> Readiness:
    """Catalog, broker and the place of the bags answer; a worker has embedded a slice lately, the canary as ever."""
    catalog = broker = True
    canary = last = None
    try:
        canary, last = stores.canaries.last(), stores.catalog.last_embedded_at()
    except SQLAlchemyError:
        catalog = False
    try:
        queue.depth()
    except BrokerDown:
        broker = False
    bags = stores.bags.answers()
    times = [when for when in (last, canary and canary[0]) if when is not None]
    ago = (now() - max(times)).total_seconds() if times else None
    ready = catalog and broker and bags and canary is not None and canary[1] >= COSINE[settings.mode]
    ready = ready and ago is not None and ago < settings.ready_seconds
    response.status_code = 200 if ready else 503
    return Readiness(
        status="ready" if ready else "not_ready",
        catalog=catalog,
        broker=broker,
        bags=bags,
        embedded_seconds_ago=ago,
        canary_cosine=canary and canary[1],
    )
