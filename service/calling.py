"""Calling a running service from a command."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from service.settings import Settings

REQUEST_SECONDS = 300.0  # of one call: a table of millions of rows takes a while to match


class CallFailed(Exception):
    """The service does not answer, or refuses what was asked."""


def client(settings: Settings, address: str | None, timeout: float = REQUEST_SECONDS) -> httpx.Client:
    """For the service at the address, that of the settings if none; it sends the settings' API key."""
    key = settings.api_key
    headers = {"Authorization": f"Bearer {key.get_secret_value()}"} if key else {}
    return httpx.Client(base_url=address or f"http://{settings.host}:{settings.port}", headers=headers, timeout=timeout)


def call(http: httpx.Client, method: str, path: str, **content: Any) -> dict[str, Any]:
    """The JSON that answers. Raises CallFailed."""
    try:
        response = http.request(method, path, timeout=REQUEST_SECONDS, **content)
        answer: dict[str, Any] = response.json()
    except httpx.TransportError as error:
        raise _silent(http, error) from error
    except ValueError as error:
        raise CallFailed(f"what answers at {http.base_url} is no Keyslice service") from error
    if response.is_error:
        raise _refused(response, answer.get("detail"))
    return answer


@contextmanager
def streamed(http: httpx.Client, path: str, params: Any, timeout: httpx.Timeout) -> Iterator[httpx.Response]:
    """A GET whose answer comes piece by piece. Raises CallFailed, also where it breaks off."""
    try:
        with http.stream("GET", path, params=params, timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise _refused(response, _detail(response))
            yield response
    except httpx.TransportError as error:
        raise _silent(http, error) from error


def _silent(http: httpx.Client, error: httpx.TransportError) -> CallFailed:
    if isinstance(error, httpx.RemoteProtocolError):
        return CallFailed(f"the service at {http.base_url} broke off while it answered; its log says why")
    return CallFailed(f"no service answers at {http.base_url}: {type(error).__name__}; start `keyslice up`")


def _refused(response: httpx.Response, detail: Any) -> CallFailed:
    hint = "; KEYSLICE_API_KEY is the key that is sent" if response.status_code == httpx.codes.UNAUTHORIZED else ""
    return CallFailed(f"{response.status_code}: {detail}{hint}")


def _detail(response: httpx.Response) -> Any:
    try:
        return response.json().get("detail")
    except (ValueError, AttributeError):
        return "what answers is no Keyslice service"
