"""HTTP with one server: nothing is sent anywhere else, and what may pass is tried again."""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import tenacity
from requests.auth import AuthBase
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from service.errors import (
    BadUpload,
    CredentialsRefused,
    SourceAway,
    SourceFailed,
    SourceNotFound,
    SourceRefused,
    UploadTooLarge,
)

# They log requests with their query, which names patients.
for _name in ("urllib3", "dicomweb_client"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)

MAY_PASS = (408, 429, 502, 503, 504)
BROKEN_OFF = (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError)

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How often something is tried, and the seconds between: twice as long each time, or what Retry-After says."""

    attempts: int = 6
    first: float = 1.0
    longest: float = 120.0


PATIENCE = Patience()


class ElsewhereRefused(requests.RequestException):
    """A redirect to another server, which was not followed."""


class OneServer(requests.Session):
    """Sends to one server alone, so that neither credentials nor queries ever reach another by a redirect."""

    def __init__(self, url: str, auth: AuthBase | None) -> None:
        super().__init__()
        self.trust_env = False  # no proxy and no .netrc that nobody thought of
        self.auth = auth
        self._origin = _origin(url)

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        if _origin(request.url or "") != self._origin:
            raise ElsewhereRefused
        return super().send(request, **options)


class Bearer(AuthBase):
    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


def patiently(call: Callable[[], T], patience: Patience) -> T:
    """What the call answers in the end, tried again while that may help. Raises SourceFailed, by the kinds of it."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_after_attempt(patience.attempts),
        wait=lambda state: _pause(state, patience),
        reraise=True,
    )
    try:
        return retrying(call)
    except (requests.RequestException, BadUpload, ValueError) as error:
        raise _named(error, patience) from None  # its own message has the URL, and so the query


def _origin(url: str) -> tuple[str, str | None, int]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def _answer(error: BaseException | None) -> requests.Response | None:
    return error.response if isinstance(error, requests.HTTPError) else None


def _may_pass(error: BaseException) -> bool:
    if (answer := _answer(error)) is not None:
        return answer.status_code in MAY_PASS
    if isinstance(error, requests.exceptions.SSLError | UploadTooLarge):
        return False
    return isinstance(error, (*BROKEN_OFF, BadUpload))


def _pause(state: tenacity.RetryCallState, patience: Patience) -> float:
    """Seconds until the next attempt."""
    wait_longer = tenacity.wait_exponential_jitter(
        multiplier=patience.first, max=patience.longest, jitter=patience.first
    )
    asked = None
    if state.outcome and (answer := _answer(state.outcome.exception())) is not None:
        with suppress(InvalidHeader):
            asked = Retry().get_retry_after(answer.raw)
    return min(max(wait_longer(state), asked or 0.0), patience.longest)


def _named(error: Exception, patience: Patience) -> SourceFailed:
    """The error without what was asked."""
    if (answer := _answer(error)) is not None:
        return _by_status(answer.status_code, patience)
    if isinstance(error, ElsewhereRefused):
        return SourceFailed("the server redirects to another one, which is not followed")
    if isinstance(error, requests.exceptions.SSLError):
        return SourceFailed("the server's certificate cannot be verified, expected one that KEYSLICE_DICOMWEB_CA knows")
    if isinstance(error, BROKEN_OFF):
        return SourceAway(
            f"the server does not answer, or broke off: {type(error).__name__}, {patience.attempts} times"
        )
    if isinstance(error, BadUpload):
        return SourceFailed(str(error))
    return SourceFailed(f"the server does not answer as DICOMweb does: {type(error).__name__}")


def _by_status(status: int, patience: Patience) -> SourceFailed:
    match status:
        case 401:
            return CredentialsRefused("the server answers 401, expected credentials that it knows")
        case 403:
            return SourceRefused("the server answers 403: these credentials may not read this")
        case 404 | 410:
            return SourceNotFound(f"the server answers {status}: it has no such thing")
        case _ if status in MAY_PASS:
            return SourceAway(f"the server answers {status}, {patience.attempts} times")
    return SourceFailed(f"the server answers {status}, expected 200")
