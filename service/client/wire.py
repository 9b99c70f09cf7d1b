"""What carries a call: httpx that blocks, or httpx that is awaited, with the same retries and errors."""

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

import httpx
import tenacity

from service.errors import BadRequest, Conflict, KeysliceError, NotFound, ServiceAway, kinds

ATTEMPTS = 5
FIRST_SECONDS, LONGEST_SECONDS = 0.5, 90.0  # between two attempts; a rate limit asks for a minute
MAY_PASS = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError)
LATER = (408, 429, 502, 503, 504)

TIMEOUT = httpx.Timeout(10, read=300, write=60)  # a table of millions of rows takes a while to match
PROBLEM = "application/problem+json"
BY_STATUS = {400: BadRequest, 404: NotFound, 409: Conflict, 422: BadRequest}  # of a service newer than this client


class Wire(Protocol):
    """Calls are written against this, once; only `Awaiting` ever lets others run meanwhile."""

    address: str
    reached: bool  # whether the service has answered at all

    def request(self, method: str, path: str, **content: Any) -> httpx.Request: ...

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response: ...

    async def read(self, response: httpx.Response) -> None: ...

    def pieces(self, response: httpx.Response) -> AsyncIterator[bytes]: ...

    async def leave(self, response: httpx.Response) -> None: ...

    async def pause(self, seconds: float) -> None: ...

    async def close(self) -> None: ...


class Blocking:
    """Over httpx.Client. No coroutine of it suspends, so it needs no event loop; see twofold.at_once()."""

    def __init__(self, address: str, http: httpx.Client) -> None:
        self.address, self.reached = address, False
        self._http = http

    def request(self, method: str, path: str, **content: Any) -> httpx.Request:
        return self._http.build_request(method, path, **content)

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        return self._http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        response.read()

    async def pieces(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        for piece in response.iter_bytes():
            yield piece

    async def leave(self, response: httpx.Response) -> None:
        response.close()

    async def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    async def close(self) -> None:
        self._http.close()


class Awaiting:
    """Over httpx.AsyncClient, for one event loop."""

    def __init__(self, address: str, http: httpx.AsyncClient) -> None:
        self.address, self.reached = address, False
        self._http = http

    def request(self, method: str, path: str, **content: Any) -> httpx.Request:
        return self._http.build_request(method, path, **content)

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        return await self._http.send(request, stream=stream)

    async def read(self, response: httpx.Response) -> None:
        await response.aread()

    async def pieces(self, response: httpx.Response) -> AsyncGenerator[bytes, None]:
        async for piece in response.aiter_bytes():
            yield piece

    async def leave(self, response: httpx.Response) -> None:
        await response.aclose()

    async def pause(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._http.aclose()


async def ask(wire: Wire, method: str, path: str, *, again: bool, **content: Any) -> httpx.Response:
    """The answer, read whole. `again`: asking twice is as good as asking once, so it may be tried several times.

    Raises KeysliceError, by the kinds of it.
    """
    return await _answer(wire, again, False, method, path, content)


@asynccontextmanager
async def streamed(wire: Wire, path: str, **content: Any) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[bytes]]]:
    """The answer to a GET, and its body piece by piece. Raises as ask() does, also where it breaks off."""
    response = await _answer(wire, True, True, "GET", path, content)
    try:
        yield response, _pieces(wire, response)
    finally:
        await wire.leave(response)


def options(api_key: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Of an httpx client: what was given, with the key, KEYSLICE_API_KEY where it is None."""
    key = os.environ.get("KEYSLICE_API_KEY") if api_key is None else api_key
    headers = httpx.Headers({"Authorization": f"Bearer {key}"} if key else {})  # which do not show it
    headers.update(given.get("headers"))
    return {"timeout": TIMEOUT, **given, "headers": headers}


def named(address: str) -> str:
    """An address as messages may show it: without a password."""
    return str(httpx.URL(address).copy_with(userinfo=b"")).rstrip("/")


async def _answer(
    wire: Wire, again: bool, stream: bool, method: str, path: str, content: dict[str, Any]
) -> httpx.Response:
    async def attempt() -> httpx.Response:
        response = await wire.send(wire.request(method, path, **content), stream=stream)
        wire.reached = True
        if stream and not response.is_success:
            await wire.read(response)
        return response

    retrying = tenacity.AsyncRetrying(
        sleep=wire.pause,
        stop=tenacity.stop_after_attempt(ATTEMPTS if again else 1),
        wait=_pause,
        retry=lambda state: _may_pass(state, wire),
        retry_error_callback=lambda state: state.outcome.result() if state.outcome else None,
    )
    try:
        response: httpx.Response = await retrying(attempt)
    except httpx.TransportError as error:
        raise _away(wire, error) from error
    if not response.is_success:
        raise problem(response, wire.address)
    return response


async def _pieces(wire: Wire, response: httpx.Response) -> AsyncGenerator[bytes, None]:
    try:
        async for piece in wire.pieces(response):
            yield piece
    except httpx.TransportError as error:
        raise _away(wire, error) from error


def _may_pass(state: tenacity.RetryCallState, wire: Wire) -> bool:
    """An address where nobody ever answered is wrong more often than it is slow."""
    assert state.outcome is not None
    error = state.outcome.exception()
    if error is not None:
        return isinstance(error, MAY_PASS) and (wire.reached or not isinstance(error, httpx.ConnectError))
    response: httpx.Response = state.outcome.result()
    return response.status_code in LATER and _asked_seconds(response) <= LONGEST_SECONDS


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt: twice as long each time, at least what Retry-After says."""
    longer = tenacity.wait_exponential_jitter(multiplier=FIRST_SECONDS, max=LONGEST_SECONDS, jitter=FIRST_SECONDS)
    failed = state.outcome is None or state.outcome.failed
    asked = 0.0 if failed or state.outcome is None else _asked_seconds(state.outcome.result())
    return max(asked, longer(state))


def _asked_seconds(response: httpx.Response) -> float:
    """What Retry-After says, in seconds or as a date (RFC 9110, 10.2.3)."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return Retry().parse_retry_after(response.headers.get("Retry-After", "0"))
    except InvalidHeader:
        return 0.0


def problem(response: httpx.Response, address: str) -> KeysliceError:
    """The error that the service meant; by its `type` where that is one of the tree, else by its status."""
    status = response.status_code
    try:
        told = dict(response.json()) if response.headers.get("content-type", "").startswith(PROBLEM) else {}
    except ValueError:
        told = {}
    if "type" not in told:
        return ServiceAway(f"what answers at {address} with status {status} is no Keyslice service", status=status)
    kind = str(told.pop("type")).removeprefix("urn:keyslice:")
    error = kinds().get(kind, BY_STATUS.get(status, KeysliceError))(str(told.pop("detail", told.get("title"))))
    error.found = told
    return error


def _away(wire: Wire, error: httpx.TransportError) -> ServiceAway:
    if isinstance(error, httpx.RemoteProtocolError | httpx.ReadError):
        return ServiceAway(f"the service at {wire.address} broke off while it answered; its log says why")
    if isinstance(error, httpx.UnsupportedProtocol):
        return ServiceAway(f"no service is at {wire.address!r}, expected an address as http://host:port")
    return ServiceAway(f"no service answers at {wire.address}: {type(error).__name__}; start `keyslice up`")
