"""Calling a running service from a command."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

REQUEST_SECONDS = 300.0  # of one call: a table of millions of rows takes a while to match


class CallFailed(Exception):
    """The service does not answer, or refuses what was asked."""


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
        raise CallFailed(f"{response.status_code}: {answer.get('detail')}")
    return answer


@contextmanager
def streamed(http: httpx.Client, path: str, params: Any, timeout: httpx.Timeout) -> Iterator[httpx.Response]:
    """A GET whose answer comes piece by piece. Raises CallFailed, also where it breaks off."""
    try:
        with http.stream("GET", path, params=params, timeout=timeout) as response:
            if response.is_error:
                response.read()
                raise CallFailed(f"{response.status_code}: {_detail(response)}")
            yield response
    except httpx.TransportError as error:
        raise _silent(http, error) from error


def _silent(http: httpx.Client, error: httpx.TransportError) -> CallFailed:
    if isinstance(error, httpx.RemoteProtocolError):
        return CallFailed(f"the service at {http.base_url} broke off while it answered; its log says why")
    return CallFailed(f"no service answers at {http.base_url}: {type(error).__name__}; start `keyslice up`")


def _detail(response: httpx.Response) -> Any:
    try:
        return response.json().get("detail")
    except (ValueError, AttributeError):
        return "what answers is no Keyslice service"
