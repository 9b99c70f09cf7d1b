"""Tokens of an identity provider: a real one over HTTP, with keys of its own."""

import hmac
import json
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import httpx
import jwt
import pytest
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm
from pydantic import ValidationError
from serving import keys_of, serving, settings_of
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from service import oidc
from service.auth import require_key
from service.oidc import Provider, scopes_of
from service.settings import Settings
from service.storage.stores import open_stores
from service.storage.tables import now

AUDIENCE = "keyslice"


class Login:
    """An OpenID Connect provider, as far as a service that trusts it sees of it."""

    def __init__(self) -> None:
        self.signers = {"first": ("RS256", rsa.generate_private_key(65537, 2048))}
        self.answers = True
        self.asked = 0
        self.named: str | None = None
        routes = [Route("/.well-known/openid-configuration", self.describe), Route("/keys", self.keys)]
        self._server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.issuer = f"http://127.0.0.1:{self._server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()

    async def describe(self, _request) -> JSONResponse:
        self.asked += 1
        told = {"issuer": self.named or self.issuer, "jwks_uri": f"{self.issuer}/keys"}
        return JSONResponse(told, 200 if self.answers else 503)

    async def keys(self, _request) -> JSONResponse:
        kinds = {"RS256": RSAAlgorithm, "ES256": ECAlgorithm}
        public = [
            json.loads(kinds[algorithm].to_jwk(key.public_key())) | {"kid": name, "use": "sig", "alg": algorithm}
            for name, (algorithm, key) in self.signers.items()
        ]
        return JSONResponse({"keys": public})

    def token(self, signer: str = "first", **claims) -> str:
        algorithm, key = self.signers[signer]
        told = {"iss": self.issuer, "aud": AUDIENCE, "sub": "ada", "exp": now() + timedelta(minutes=5)}
        told |= {"scope": "openid keyslice:read"} | claims
        told = {name: value for name, value in told.items() if value is not None}
        return jwt.encode(told, key, algorithm, headers={"kid": signer})


@pytest.fixture
def login() -> Iterator[Login]:
    provider = Login()
    yield provider
    provider.close()


@pytest.fixture
def settings(tmp_path, login: Login) -> Settings:
    return settings_of(tmp_path, oidc_issuer=login.issuer, oidc_audience=AUDIENCE)


@pytest.fixture
def http(settings: Settings) -> Iterator[httpx.Client]:
    with serving(settings, port=0) as server:
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=address, timeout=30) as client:
            yield client


def ask(http: httpx.Client, token: str, path: str = "/v1/series") -> httpx.Response:
    return http.get(path, headers={"Authorization": f"Bearer {token}"})


def reason(answer: httpx.Response) -> str:
    assert answer.status_code == 401, answer.text
    return answer.json()["reason"]


def test_a_token_lets_in_by_its_scopes_and_nobody_without_one(http, login):
    assert ask(http, login.token()).status_code == 200
    assert reason(http.get("/v1/series")) == "missing"
    refused = ask(http, login.token(scope="openid keyslice:write"))
    assert refused.status_code == 403
    assert (refused.json()["scopes"], refused.json()["needed"]) == (["write"], ["read"])
    assert ask(http, login.token(scope="openid read")).status_code == 403


def test_keys_count_beside_tokens(http, login, settings):
    _, key = keys_of(settings).create("ward", ["read"], None)
    time.sleep(1.1)  # keys are read again each second

    assert ask(http, key).status_code == 200
    assert ask(http, login.token()).status_code == 200


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"exp": timedelta(minutes=-5)}, "expired"),
        ({"nbf": timedelta(minutes=5)}, "unknown"),
        ({"aud": "another"}, "unknown"),
        ({"iss": "https://another.example"}, "unknown"),
        ({"exp": None}, "unknown"),
        ({"sub": None}, "unknown"),
        ({"aud": None}, "unknown"),
    ],
)
def test_a_token_that_does_not_hold(http, login, claims, expected):
    held = {name: now() + value if isinstance(value, timedelta) else value for name, value in claims.items()}
    assert reason(ask(http, login.token(**held))) == expected


def test_a_token_that_somebody_else_signed(http, login):
    mine = login.token().split(".")
    other = rsa.generate_private_key(65537, 2048)
    claims = jwt.decode(login.token(), options={"verify_signature": False})
    public = login.signers["first"][1].public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = jwt.utils.base64url_encode(b'{"alg":"HS256","kid":"first"}').decode()
    signed = f"{head}.{mine[1]}"
    mac = hmac.digest(public, signed.encode(), "sha256")  # the public key taken for a shared secret

    assert reason(ask(http, jwt.encode(claims, other, "RS256", headers={"kid": "first"}))) == "unknown"
    assert reason(ask(http, jwt.encode(claims, None, "none", headers={"kid": "first"}))) == "unknown"
    assert reason(ask(http, f"{signed}.{jwt.utils.base64url_encode(mac).decode()}")) == "unknown"
    assert reason(ask(http, ".".join([mine[0], mine[1], "AAAA"]))) == "unknown"
    assert reason(ask(http, "a.b.c")) == "unknown"
    assert reason(ask(http, "a.b")) == "malformed"


def test_a_new_key_of_the_provider_is_found_and_one_that_is_gone_counts_no_more(http, login, monkeypatch):
    old = login.token()
    assert ask(http, old).status_code == 200
    login.signers["second"] = ("ES256", ec.generate_private_key(ec.SECP256R1()))
    del login.signers["first"]
    monkeypatch.setattr(oidc, "ASKED_SECONDS", 0.0)

    assert ask(http, login.token("second")).status_code == 200
    assert reason(ask(http, old)) == "unknown"


def test_the_provider_is_asked_rarely_whatever_comes(http, login):
    login.signers["unknown"] = login.signers["first"]
    token = login.token("unknown")
    del login.signers["unknown"]

    for _ in range(20):
        assert reason(ask(http, token)) == "unknown"
    assert login.asked == 1


def test_a_provider_that_is_away(http, login, monkeypatch):
    login.answers = False

    answer = ask(http, login.token())
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:keyslice:provider-away")
    assert ask(http, login.token()).status_code == 503
    assert login.asked == 1

    login.answers = True
    monkeypatch.setattr(oidc, "ASKED_SECONDS", 0.0)
    assert ask(http, login.token()).status_code == 200

    login.answers = False
    monkeypatch.setattr(oidc, "KEYS_SECONDS", 0.0)
    assert ask(http, login.token()).status_code == 200  # its keys are known


def test_a_description_of_another_issuer_is_not_believed(http, login):
    login.named = "https://another.example"

    assert ask(http, login.token()).status_code == 503


def test_the_audit_names_the_subject(http, login, settings):
    uid = "1.2.826.0.1.3680043.8.498.1"
    ask(http, login.token(sub="ada"), f"/v1/series/{uid}")
    ask(http, login.token(sub="ada", scope=""), f"/v1/series/{uid}")
    time.sleep(1.5)  # reads are gathered for a second

    stores = open_stores(settings)
    told = [json.loads(row.entry) for row in stores.audit.list(names={}, who="user:ada", since=None, limit=10)]
    assert {each["outcome"] for each in told} == {"refused", "denied"}
    stores.close()


def test_scopes_are_words_or_items_of_ours():
    assert scopes_of("keyslice:read openid keyslice:train") == {"read", "train"}
    assert scopes_of(["keyslice:admin", "keyslice:root", 7]) == {"admin"}
    assert scopes_of(None) == scopes_of({"keyslice:read": True}) == scopes_of("keyslice:") == frozenset()


def test_roles_instead_of_scopes(tmp_path, login):
    provider = Provider(login.issuer, AUDIENCE, "roles")

    bearer = provider.bearer(login.token(roles=["keyslice:write", "staff"]))

    assert (bearer.subject, bearer.scopes) == ("ada", {"write"})


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"oidc_issuer": "https://login.example"}, "expected both or none"),
        ({"oidc_audience": "keyslice"}, "expected both or none"),
        ({"oidc_issuer": "http://login.example", "oidc_audience": "keyslice"}, "starts with https://"),
        ({"oidc_issuer": "login.example", "oidc_audience": "keyslice"}, "starts with https://"),
    ],
)
def test_half_a_provider_is_refused_at_the_start(variables, expected):
    with pytest.raises(ValidationError, match=expected):
        Settings(**variables)


def test_a_provider_is_enough_to_let_other_machines_in(settings):
    exposed = settings.model_copy(update={"host": "0.0.0.0"})

    require_key(exposed, keys_of(exposed))
