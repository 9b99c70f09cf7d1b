"""Access tokens of an OpenID Connect provider: whose they are, for whom, and which scopes they carry.

The provider's keys come by OpenID Connect Discovery 1.0, section 4; what must hold of a token is RFC 7519 and RFC 9068,
section 4. Its scopes are `keyslice:read` and so on, in `scope` (RFC 8693, section 4.2) or in a claim of the settings.
"""

import logging
import math
import threading
import time
from dataclasses import dataclass
from typing import Any, get_args

import httpx
import jwt

from service import errors
from service.settings import Settings
from service.storage.api_keys import Scope

PREFIX = "keyslice:"
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA")
LEEWAY_SECONDS = 30  # that two clocks may differ
KEYS_SECONDS = 3600.0  # after which the provider's keys are read again
ASKED_SECONDS = 10.0  # between two readings at least
TIMEOUT_SECONDS = 5.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bearer:
    subject: str
    scopes: frozenset[str]


class Provider:
    """One issuer whose tokens count. Keys are read when a token needs them, so the provider may start later."""

    def __init__(self, issuer: str, audience: str, claim: str) -> None:
        self._issuer = issuer
        self._audience = audience
        self._claim = claim
        self._lock = threading.Lock()
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = self._tried_at = -math.inf

    @staticmethod
    def of(settings: Settings) -> "Provider | None":
        if settings.oidc_issuer is None or settings.oidc_audience is None:
            return None
        return Provider(settings.oidc_issuer, settings.oidc_audience, settings.oidc_claim)

    def bearer(self, token: str) -> Bearer:
        """Waits for the provider where its keys are not known. Raises Unauthenticated or ProviderAway."""
        try:
            key = self._key(str(jwt.get_unverified_header(token).get("kid", "")))
            claims: dict[str, Any] = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except jwt.ExpiredSignatureError as error:
            raise errors.Unauthenticated("the token has expired", reason="expired") from error
        except jwt.InvalidAudienceError as error:
            raise errors.Unauthenticated("the token is for another audience", reason="unknown") from error
        except jwt.InvalidIssuerError as error:
            raise errors.Unauthenticated("the token is another issuer's", reason="unknown") from error
        except jwt.InvalidTokenError as error:
            raise errors.Unauthenticated(
                f"the token does not hold: {type(error).__name__}", reason="unknown"
            ) from error
        return Bearer(str(claims["sub"]), scopes_of(claims.get(self._claim)))

    def _key(self, key_id: str) -> jwt.PyJWK:
        """The provider is asked rarely, however many tokens of unknown keys come, and whether it answers or not."""
        with self._lock:
            now = time.monotonic()
            wanted = key_id not in self._keys or now - self._read_at > KEYS_SECONDS
            if wanted and now - self._tried_at > ASKED_SECONDS:
                self._tried_at = now
                self._read()
            if key := self._keys.get(key_id):
                return key
        if self._read_at < self._tried_at:
            raise errors.ProviderAway("the identity provider does not tell its keys; the service's log says why")
        raise errors.Unauthenticated("the token is signed by a key that its issuer does not have", reason="unknown")

    def _read(self) -> None:
        """What was read before goes on being true until the provider says otherwise."""
        try:
            with httpx.Client(timeout=TIMEOUT_SECONDS) as http:
                place = self._issuer.removesuffix("/") + "/.well-known/openid-configuration"
                described = http.get(place).raise_for_status().json()
                if described["issuer"] != self._issuer:
                    raise ValueError("of another issuer")
                found = http.get(described["jwks_uri"]).raise_for_status().json()
            self._keys = {str(key.key_id): key for key in jwt.PyJWKSet.from_dict(found).keys if key.key_id}
            self._read_at = time.monotonic()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, jwt.PyJWTError) as error:
            log.error("the identity provider's keys cannot be read: %s", type(error).__name__)


def scopes_of(claim: Any) -> frozenset[str]:
    """Ours among those of a token: words of a string, or items of a list."""
    words = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
    return frozenset(scope for scope in get_args(Scope) if f"{PREFIX}{scope}" in words)
