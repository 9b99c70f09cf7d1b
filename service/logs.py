"""Log lines: plain, or a JSON object each, with the ids of what they are about. No line says who a patient is."""

import inspect
import logging
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from celery import Task
from celery.signals import setup_logging, task_postrun, task_prerun
from pythonjsonlogger.json import JsonFormatter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.settings import Settings

OURS = ("service", "workers", "models")
LIBRARIES = ("uvicorn", "celery")
FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"
RENAMED = {"asctime": "time", "levelname": "level", "name": "logger"}
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# What a line may name: ids of ours and UIDs, never a patient's.
NAMED = ("series_uid", "job_id", "head_id", "export_id", "erasure_id", "prediction_id")

NOTHING: Mapping[str, str] = MappingProxyType({})

_about: ContextVar[Mapping[str, str]] = ContextVar("about", default=NOTHING)
log = logging.getLogger(__name__)


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Lines of this thread or task name these ids too, as long as the block lasts."""
    token = _about.set({**_about.get(), **ids})
    try:
        yield
    finally:
        _about.reset(token)


def set_up(settings: Settings) -> None:
    """Where JSON is asked for, every line of this process is it, whoever writes it."""
    if settings.log_format == "json":
        as_json()


def as_json() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(FIELDS, rename_fields=RENAMED))
    handler.addFilter(_with_ids)
    root = logging.getLogger()
    root.handlers, root.level = [handler], logging.WARNING  # libraries at less name addresses, and whom they ask about
    logging.captureWarnings(True)
    for name in (*OURS, *LIBRARIES):
        logging.getLogger(name).setLevel(logging.INFO)
    for name in logging.root.manager.loggerDict:
        if name.partition(".")[0] in LIBRARIES:
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True


def _with_ids(record: logging.LogRecord) -> bool:
    vars(record).update(_about.get())
    return True


class Logged:
    """ASGI middleware: a request has an id, the caller's own or a new one, which lines and the answer carry; and a line
    when it ends, by route, for paths name patients."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, status, started = _request_id(scope), 0, time.perf_counter()

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        with about(request_id=request_id):
            try:
                await self._app(scope, receive, named)
            finally:
                route = getattr(scope.get("route"), "path_format", "unmatched")
                # What a caller words in a path that names nothing here may be anything.
                ids = {name: scope["path_params"][name] for name in NAMED if name in scope.get("path_params", {})}
                told = {"route": route, "status": status, "ms": round(1000 * (time.perf_counter() - started), 1)}
                log.info("%s %s", scope["method"], route, extra=told | (ids if 200 <= status < 400 else {}))


def _request_id(scope: Scope) -> str:
    sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return sent.decode() if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex


def follow_tasks(settings: Settings) -> None:
    """A worker's lines name the task and what it is about."""
    if settings.log_format == "json":
        as_json()  # Celery warns before it sets logging up
        setup_logging.connect(lambda **_: as_json(), weak=False)  # instead of Celery's own way
        task_prerun.connect(_begin, weak=False)
        task_postrun.connect(_end, weak=False)


def _begin(task_id: str, task: Task, args: Any, kwargs: Any, **_: Any) -> None:
    given = inspect.signature(task.run).bind_partial(*args, **kwargs).arguments
    ids = {name: str(given[name]) for name in NAMED if name in given}
    _about.set({"task": task.name, "task_id": task_id, **ids})


def _end(**_: Any) -> None:
    _about.set(NOTHING)
