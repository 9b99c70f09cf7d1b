"""create_app(): opens the stores, mounts the routers, maps errors to statuses."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import Any, TypedDict

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from service import errors, logs, traces
from service.audited import Audited
from service.auth import Access, Authenticated, require_key
from service.bounded import Bounded
from service.deps import EncoderNames, cached_heads
from service.dicomweb.addresses import PREFIX
from service.disk import is_full
from service.erasing import Eraser
from service.logs import Logged
from service.metrics import FromStores, Timed
from service.queue import Queue
from service.recorder import Recorder
from service.routes import (
    dicom,
    dicomweb,
    embeddings,
    encoders,
    erasures,
    explanations,
    exports,
    features,
    heads,
    health,
    jobs,
    metrics,
    page,
    predictions,
    reports,
    search,
    series,
    wado,
)
from service.schemas.base import Problem
from service.settings import Settings
from service.storage.stores import open_stores
from service.timely import Timely
from service.traces import Traced

# The only table from errors to statuses; the most derived class that is listed decides.
STATUSES: dict[type[errors.KeysliceError], int] = {
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Unauthenticated: 401,
    errors.ScopeMissing: 403,
    errors.BeyondKey: 403,
    errors.TooManyRequests: 429,
    errors.LicenceNotAccepted: 403,
    errors.PathNotAllowed: 403,
    errors.PeerNotAllowed: 403,
    errors.PeerFailed: 502,
    errors.UploadTooLarge: 413,
    errors.BadDicomWeb: 400,
    errors.UnsupportedMedia: 415,
    errors.NotAcceptable: 406,
    errors.BadRequest: 422,
    errors.NoRoom: 507,
    errors.BrokerDown: 503,
    errors.ProviderAway: 503,
    errors.StorageUnreachable: 503,
    errors.ErasureUnfinished: 503,
    errors.WorkersBusy: 503,
}

ROUTERS = (
    series,
    dicomweb,
    wado,
    erasures,
    embeddings,
    features,
    predictions,
    explanations,
    dicom,
    search,
    exports,
    heads,
    reports,
    jobs,
    encoders,
    health,
    metrics,
    page,
)

PROBLEM = "application/problem+json"
INVALID = "invalid-request", "The request does not match the schema"
MOST_ERRORS = 20  # of one request that are told
PROBLEM_CONTENT = {"schema": {"$ref": "#/components/schemas/Problem"}}

log = logging.getLogger(__name__)


class State(TypedDict):
    settings: Any
    stores: Any
    queue: Any
    encoders: Any
    heads: Any
    access: Any
    recorder: Any


def create_app(settings: Settings | None = None) -> FastAPI:
    """The API over the stores of these settings; of the environment's where none are given."""
    settings = settings or Settings()
    logs.set_up(settings)
    registry = CollectorRegistry()

    app = FastAPI(
        title="Keyslice",
        summary="An embedding feature store for CT",
        description="Research use only; not a medical device.",
        version=version("keyslice"),
        lifespan=_lifespan(settings, registry),
        redirect_slashes=False,
        telemetry={"tracing": False, "logs": False},  # they have paths, which name patients; see service/traces.py
        responses={
            "4XX": {"description": "What was found and what was expected", "content": {PROBLEM: PROBLEM_CONTENT}}
        },
    )
    for router in ROUTERS:
        app.include_router(router.router)
    app.state.metrics = registry
    app.add_middleware(Bounded, settings=settings)
    app.add_middleware(Timely, seconds=settings.max_upload_seconds, silent_seconds=settings.upload_silent_seconds)
    app.add_middleware(Audited)
    app.add_middleware(Authenticated, refuse=_on_error)
    app.add_middleware(Timed, registry=registry)
    app.add_middleware(Logged)
    if traces.set_up("api"):
        app.add_middleware(Traced)
    if origins := [each.strip() for each in settings.cors_origins.split(",") if each.strip()]:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    app.add_exception_handler(errors.KeysliceError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(OSError, _on_full_disk)
    app.add_exception_handler(OperationalError, _on_full_disk)
    app.add_exception_handler(Exception, _on_bug)
    _publish_problems(app)
    return app


def _lifespan(
    settings: Settings, registry: CollectorRegistry
) -> Callable[[FastAPI], AbstractAsyncContextManager[State]]:
    """What requests share, open while the app runs, and the sweeps beside them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        stores = await run_in_threadpool(open_stores, settings)
        require_key(settings, stores.api_keys)
        queue, recorder = Queue(settings, stores), Recorder(stores.audit, settings.audit_days)
        collector = FromStores(stores, queue, settings.data_dir)
        registry.register(collector)
        sweeps = queue.sweep, Eraser(stores, queue, settings).sweep, stores.contents.trim
        sweepers = [asyncio.create_task(_sweep_for_ever(sweep, settings.sweep_seconds)) for sweep in sweeps]
        yield {
            "settings": settings,
            "stores": stores,
            "queue": queue,
            "encoders": EncoderNames(settings),
            "heads": cached_heads(stores),
            "access": Access(stores.api_keys, settings),
            "recorder": recorder,
        }
        for sweeper in sweepers:
            sweeper.cancel()
        registry.unregister(collector)
        queue.close()
        await run_in_threadpool(recorder.close)
        stores.close()

    return lifespan


async def _sweep_for_ever(sweep: Callable[[], None], seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await run_in_threadpool(sweep)
        except (errors.BrokerDown, errors.StorageUnreachable) as error:
            log.warning("sweep: %s", error)
        except Exception as error:  # a catalog that is away comes back; the sweep must be there then
            log.error("sweep: %s", type(error).__name__)


def _problem(status: int, kind: str, title: str, detail: str, found: Mapping[str, Any] | None = None) -> JSONResponse:
    body = {"type": f"urn:keyslice:{kind}", "title": title, "status": status, "detail": detail, **(found or {})}
    return JSONResponse(body, status, media_type=PROBLEM)


async def _on_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, errors.KeysliceError)
    status = next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)
    title = (type(error).__doc__ or "").rstrip(".")
    answer = _problem(status, errors.kebab(type(error).__name__), title, str(error), error.found)
    answer.headers.update(_headers(error))
    return answer


def _headers(error: errors.KeysliceError) -> dict[str, str]:
    """RFC 6750, 3 for callers without a key that will do, RFC 6585, 4 for those who call too often."""
    challenge = 'Bearer realm="keyslice"'
    match error:
        case errors.Unauthenticated() if error.found["reason"] in ("missing", "not_local"):
            return {"WWW-Authenticate": challenge}
        case errors.Unauthenticated():
            return {"WWW-Authenticate": f'{challenge}, error="invalid_token"'}
        case errors.ScopeMissing():
            needed = " ".join(error.found["needed"])
            return {"WWW-Authenticate": f'{challenge}, error="insufficient_scope", scope="{needed}"'}
        case errors.TooManyRequests():
            return {"Retry-After": str(error.found["retry_after_seconds"])}
    return {}


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    found = [{"where": list(each["loc"]), "expected": each["msg"]} for each in error.errors()[:MOST_ERRORS]]
    detail = "; ".join(f"{'.'.join(map(str, each['where']))}: {each['expected']}" for each in found)
    status = 400 if request.url.path.startswith(PREFIX) else 422  # PS3.18 knows 400 alone
    return _problem(status, *INVALID, detail, {"errors": found})


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, errors.KeysliceError):  # FastAPI says 400 of whatever reading a body raises
        return await _on_error(request, error.__cause__)
    if error.status_code == 400:  # or what it finds wrong with one that is no JSON or no form at all
        return _problem(400, *INVALID, error.detail)
    answer = _problem(
        error.status_code, errors.kebab(error.detail.title().replace(" ", "")), error.detail, error.detail
    )
    answer.headers.update(error.headers or {})
    return answer


async def _on_disconnect(_: Request, __: Exception) -> JSONResponse:
    return _problem(400, "client-disconnected", "The client went away", "the body ended early")


async def _on_full_disk(request: Request, error: Exception) -> JSONResponse:
    if not is_full(error):
        raise error
    return await _on_error(request, errors.NoRoom("the disk is full, expected room for what was sent"))


async def _on_bug(_: Request, error: Exception) -> JSONResponse:
    return _problem(500, "internal-error", "An error of ours", f"{type(error).__name__}; the log has its place")


def _publish_problems(app: FastAPI) -> None:
    """The OpenAPI says what is really answered: problem+json, not FastAPI's own 422."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            schemas = schema["components"]["schemas"]
            schemas["Problem"] = Problem.model_json_schema()
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
