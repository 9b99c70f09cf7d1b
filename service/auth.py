"""Who is calling: by API key, by a provider's token, or nobody in particular on a machine that is open to itself.

The rule is docs/decisions/0021: a key is needed as soon as one was ever made, or callers of other machines are let in.
"""

import hmac
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import get_args

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service import errors
from service.allowance import Allowance
from service.local import from_elsewhere, names_loopback
from service.oidc import Provider
from service.routes import page
from service.settings import Settings, is_loopback
from service.storage import api_keys
from service.storage.api_keys import ApiKeys, read_token
from service.storage.tables import ApiKeyRow

PAGE = ("/", *(f"/{name}" for name in page.FILES))
SCHEMA = ("/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json")
PUBLIC = frozenset({*PAGE, *SCHEMA, "/healthz", "/readyz"})
READ_SECONDS = 1.0  # after which keys are read again: as long a revoked one may still be used
NOTED_SECONDS = 3600.0  # between two notes that a key was used
NO_DIGEST = bytes(32)  # compared with for an id that is not there, so that the time does not tell

DOTS_OF_A_JWT = 2  # RFC 7515, section 7.1

MAKE_ONE = "make one with `keyslice keys create`"

log = logging.getLogger(__name__)


class NoUsableKey(Exception):
    """Other machines would be let in, and there is no key to know anybody by."""


@dataclass(frozen=True)
class Caller:
    name: str  # key:ID, user:SUBJECT or local
    scopes: frozenset[str]
    tags: tuple[str, ...] = ()  # sees only series with one of them; all where empty


ANYONE_HERE = Caller("local", frozenset(get_args(api_keys.Scope)))


def exposed(settings: Settings) -> str | None:
    """The setting that lets callers of other machines in, with its value; None where none does."""
    if not is_loopback(settings.host):
        return f"KEYSLICE_HOST is {settings.host}"
    if settings.public_url and not names_loopback(settings.public_url):
        return f"KEYSLICE_PUBLIC_URL is {settings.public_url}"
    return None


def require_key(settings: Settings, keys: ApiKeys) -> None:
    """Before listening. Raises NoUsableKey."""
    found = exposed(settings)
    if found and not settings.oidc_issuer and not any(row.state == "active" for row in keys.list()):
        raise NoUsableKey(f"{found}, expected a loopback address or an API key that can be used: {MAKE_ONE}")


class Access:
    """Tells who a request is from. Keys are kept in memory, and read again when older than `read_seconds`."""

    def __init__(self, keys: ApiKeys, settings: Settings, read_seconds: float = READ_SECONDS) -> None:
        self._keys = keys
        self._provider = Provider.of(settings)
        self._closed = exposed(settings) is not None or self._provider is not None
        self._origins = settings.cors_origins
        self._allowance = Allowance(settings.rate_limit)
        self._read_seconds = read_seconds
        self._noted: dict[str, float] = {}
        self._read_at = -math.inf
        self._known = self._read()

    async def caller(self, request: Request) -> Caller:
        """Raises Unauthenticated, ProviderAway or TooManyRequests."""
        await self._refresh()
        if self._known or self._closed:
            caller = await self._of_token(request.headers.get("authorization"))
        else:
            if reason := from_elsewhere(request, self._origins):
                raise errors.Unauthenticated(
                    f"there is no API key, so callers on this machine alone are served, and {reason}: {MAKE_ONE}",
                    reason="not_local",
                )
            caller = ANYONE_HERE
        self._allowance.take(caller.name)
        return caller

    async def _of_token(self, authorization: str | None) -> Caller:
        if authorization is None:
            raise errors.Unauthenticated("no key came with it, expected Authorization: Bearer ks_...", reason="missing")
        scheme, _, token = authorization.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" else ""
        if read := read_token(token):
            caller = self._of_key(*read)
            await self._note(read[0])
            return caller
        if self._provider and token.count(".") == DOTS_OF_A_JWT:
            bearer = await run_in_threadpool(self._provider.bearer, token)
            return Caller(f"user:{bearer.subject}", bearer.scopes)
        raise errors.Unauthenticated("what came is no API key, expected Bearer ks_...", reason="malformed")

    def _of_key(self, key_id: str, digest: bytes) -> Caller:
        row = self._known.get(key_id)
        if not hmac.compare_digest(row.digest if row else NO_DIGEST, digest) or row is None:
            raise errors.Unauthenticated("no such API key", reason="unknown")
        if row.state != "active":
            raise errors.Unauthenticated(f"key {key_id} is {row.state}", reason=row.state)
        return Caller(f"key:{key_id}", frozenset(row.scopes), tuple(row.tags))

    async def _refresh(self) -> None:
        if time.monotonic() - self._read_at < self._read_seconds:
            return
        self._read_at = time.monotonic()  # others go on with what is known meanwhile
        try:
            self._known = await run_in_threadpool(self._read)
        except SQLAlchemyError as error:  # a catalog that is away revokes nothing
            log.error("API keys: %s", type(error).__name__)

    def _read(self) -> dict[str, ApiKeyRow]:
        self._read_at = time.monotonic()
        return {row.key_id: row for row in self._keys.list()}

    async def _note(self, key_id: str) -> None:
        if time.monotonic() - self._noted.get(key_id, -NOTED_SECONDS) < NOTED_SECONDS:
            return
        self._noted[key_id] = time.monotonic()
        try:
            await run_in_threadpool(self._keys.used, key_id)
        except SQLAlchemyError as error:
            log.error("API keys: %s", type(error).__name__)


class Authenticated:
    """ASGI middleware: a request that is not public goes no further without its caller; its body is not read before."""

    def __init__(self, app: ASGIApp, refuse: Callable[[Request, Exception], Awaitable[Response]]) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in PUBLIC:
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        access: Access = request.state.access
        try:
            request.state.caller = await access.caller(request)
        except errors.KeysliceError as error:
            answer = await self._refuse(request, error)
            await answer(scope, receive, send)
            return
        await self._app(scope, receive, send)
