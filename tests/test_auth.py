"""Who may call: keys, scopes, the rule of when a key is needed, and what is refused before it is read."""

import asyncio
import hashlib
import json
import logging
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import get_args

import httpx
import pytest
from serving import keys_of, serving, settings_of
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient
from typer.testing import CliRunner

from service.allowance import Allowance
from service.app import create_app
from service.audited import AUDITED
from service.auth import PUBLIC, Access, Authenticated, NoUsableKey
from service.cli import app as command
from service.errors import TooManyRequests, Unauthenticated
from service.local import from_elsewhere
from service.settings import Settings
from service.storage.api_keys import ApiKeys, Scope, read_token
from service.storage.tables import now

SCOPES: tuple[str, ...] = get_args(Scope)
ROOT = Path(__file__).resolve().parent.parent


def request(server=("127.0.0.1", 8000), **headers: str) -> Request:
    encoded = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "GET", "path": "/v1/series", "server": server, "headers": encoded})


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@dataclass
class Place:
    address: str
    http: httpx.Client
    keys: dict[str, str]
    openapi: dict


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, broker: str) -> Iterator[Place]:
    """A real server with a key for each scope."""
    settings = settings_of(
        tmp_path_factory.mktemp("auth"),
        broker_url=broker,
        upload_silent_seconds=0.3,
        cors_origins="https://viewer.example",
    )
    keys = {scope: keys_of(settings).create(scope, [scope], None)[1] for scope in SCOPES}
    with serving(settings, port=0) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, timeout=30) as http:
            yield Place(address, http, keys, http.get("/openapi.json").json())


def calls(openapi: dict) -> Iterator[tuple[str, str, list[str]]]:
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            found = [scopes for each in operation.get("security", []) for scopes in each.values()]
            yield method.upper(), path, found[0] if found else []


def test_every_route_but_the_public_ones_names_its_scope(place):
    found = {(method, path): scopes for method, path, scopes in calls(place.openapi)}

    assert len(found) > 50
    assert {path for (_, path), scopes in found.items() if not scopes} == {"/healthz", "/readyz"}
    assert {scope for scopes in found.values() for scope in scopes} == set(SCOPES)
    scheme = place.openapi["components"]["securitySchemes"]["api_key"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


def test_every_route_says_whether_it_is_audited(place):
    """One that serves or takes patient data needs a line in service/audited.py; NOBODYS says that it has none."""
    assert set(AUDITED) == {f"{method} {path}" for method, path, _ in calls(place.openapi)} - {
        "GET /healthz",
        "GET /readyz",
    }
    assert [name for name, kind in AUDITED.items() if not kind and re.search("{(patient|series|study)", name)] == []


def test_the_docs_name_every_route_that_needs_more_than_read(place):
    page = (ROOT / "docs/api.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| .*? \| (.*?) \|$", page, re.MULTILINE)

    documented = {(*call.split(" "), scope) for scope, cell in rows for call in re.findall(r"`([A-Z]+ /[^`]+)`", cell)}

    offered = {(method, path, scope) for method, path, scopes in calls(place.openapi) for scope in scopes}
    assert documented == {each for each in offered if each[2] != "read"}


def test_each_route_wants_a_key_and_that_with_its_scope(place):
    for method, path, scopes in calls(place.openapi):
        url = re.sub(r"\{\w+\}", "1", path)
        if not scopes:
            assert place.http.request(method, url).status_code in (200, 503), path
            continue
        stranger = place.http.request(method, url)
        assert stranger.status_code == 401, (method, path)
        for scope in SCOPES:
            answer = place.http.request(method, url, headers=bearer(place.keys[scope]))
            assert (answer.status_code == 403) == (scope not in scopes), (method, path, scope)
            assert answer.status_code != 401


def test_strangers_are_told_how_to_come_in(place):
    answer = place.http.get("/v1/series")

    assert answer.status_code == 401
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["www-authenticate"] == 'Bearer realm="keyslice"'
    assert answer.json()["type"] == "urn:keyslice:unauthenticated"
    assert answer.json()["reason"] == "missing"


def test_a_path_that_is_not_there_is_no_secret_to_be_found_without_a_key(place):
    assert place.http.get("/v1/nothing").status_code == 401
    assert place.http.get("/v1/nothing", headers=bearer(place.keys["read"])).status_code == 404


def test_a_key_without_the_scope_is_told_what_it_has_and_needs(place):
    answer = place.http.post("/v1/series", headers=bearer(place.keys["read"]))

    assert answer.status_code == 403
    assert answer.json()["type"] == "urn:keyslice:scope-missing"
    assert (answer.json()["scopes"], answer.json()["needed"]) == (["read"], ["write"])
    assert answer.headers["www-authenticate"] == 'Bearer realm="keyslice", error="insufficient_scope", scope="write"'


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        ("", "malformed"),
        ("Bearer", "malformed"),
        ("Basic dXNlcjpwYXNz", "malformed"),
        ("Bearer ks_", "malformed"),
        (f"Bearer ks_{'0' * 12}_{'0' * 63}", "malformed"),
        (f"Bearer ks_{'0' * 12}_{'0' * 64}", "unknown"),
        ("Bearer ks_%s_" + "0" * 64, "unknown"),
    ],
)
def test_what_is_no_key_is_refused(place, authorization, reason):
    key_id = place.keys["read"].split("_")[1]

    answer = place.http.get("/v1/series", headers={"Authorization": authorization.replace("%s", key_id)})

    assert (answer.status_code, answer.json()["reason"]) == (401, reason)
    assert answer.headers["www-authenticate"] == 'Bearer realm="keyslice", error="invalid_token"'
    assert "0" * 63 not in answer.text


def test_the_scheme_is_read_in_any_case(place):
    assert place.http.get("/v1/series", headers={"Authorization": f"bearer {place.keys['read']}"}).status_code == 200


def test_public_pages_need_no_key(place):
    for path in PUBLIC:
        assert place.http.get(path).status_code in (200, 503), path


def test_a_viewer_of_an_allowed_origin_may_send_its_key(place):
    origin = {"Origin": "https://viewer.example"}
    asked = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "authorization"}

    preflight = place.http.options("/dicom-web/studies", headers=origin | asked)
    refused = place.http.get("/dicom-web/studies", headers=origin)
    stranger = place.http.options("/dicom-web/studies", headers={"Origin": "https://evil.example"} | asked)

    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == "authorization"
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == origin["Origin"]
    assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize(("path", "scope"), [("/v1/series", "write"), ("/v1/heads", "train")])
def test_a_body_that_stands_still_is_answered_with_408(place, path, scope):
    host, port = httpx.URL(place.address).host, httpx.URL(place.address).port
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: Bearer {place.keys[scope]}\r\n"
        "Connection: close\r\nContent-Type: multipart/form-data; boundary=edge\r\nContent-Length: 1000\r\n\r\n--edge"
    )
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["type"] == "urn:keyslice:request-timeout"


def test_no_body_is_read_before_its_sender_is_known(tmp_path):
    settings = settings_of(tmp_path)
    keys_of(settings).create("any", ["write"], None)
    sent = []

    async def call():
        async def never():
            raise AssertionError("the body was asked for")

        async def send(message):
            sent.append(message)

        async def refuse(_request, error):
            return PlainTextResponse(str(error), 401)

        scope = request().scope | {"state": {"access": Access(keys_of(settings), settings)}}
        await Authenticated(never, refuse)(scope, never, send)

    asyncio.run(call())

    assert sent[0]["status"] == 401


def test_no_key_is_in_any_log_or_answer(place, caplog):
    caplog.set_level(logging.DEBUG)
    key = place.keys["read"]
    wrong = f"ks_{key.split('_')[1]}_{'ab' * 32}"

    answers = [
        place.http.get("/v1/series/none", headers=bearer(key)),
        place.http.post("/v1/series", headers=bearer(key)),
        place.http.get("/v1/series", headers=bearer(wrong)),
        place.http.get("/metrics", headers=bearer(place.keys["metrics"])),
    ]

    assert [answer.status_code for answer in answers] == [404, 403, 401, 200]
    for secret in (key.split("_")[2], "ab" * 32):
        assert secret not in caplog.text
        assert not [answer for answer in answers if secret in answer.text + str(answer.headers)]


def test_a_key_is_stored_as_the_digest_of_its_secret_and_nothing_else(stores):
    row, key = stores.api_keys.create("reader", ["read", "metrics", "read"], None)
    key_id, secret = re.fullmatch(r"ks_([0-9a-f]{12})_([0-9a-f]{64})", key).groups()

    (stored,) = stores.api_keys.list()

    assert (stored.key_id, stored.scopes, stored.state) == (key_id, ["metrics", "read"], "active")
    assert stored.digest == row.digest == hashlib.sha256(bytes.fromhex(secret)).digest()
    assert read_token(key) == (key_id, stored.digest)
    assert stored.used_at is None
    stores.api_keys.used(key_id)
    assert now() - stores.api_keys.list()[0].used_at < timedelta(hours=1)


def test_two_keys_never_are_the_same(stores):
    assert len({stores.api_keys.create("x", ["read"], None)[1] for _ in range(20)}) == 20


@pytest.fixture
def settings(tmp_path) -> Settings:
    return settings_of(tmp_path)


@pytest.fixture
def keys(settings) -> ApiKeys:
    return keys_of(settings)


def known(keys: ApiKeys, settings: Settings, asked: Request):
    return asyncio.run(Access(keys, settings, read_seconds=0).caller(asked))


def test_a_machine_without_keys_is_open_to_itself_until_there_is_one(keys, settings):
    async def before_and_after():
        access = Access(keys, settings, read_seconds=0)
        first = await access.caller(request())
        row, key = keys.create("first", ["read"], None)
        with pytest.raises(Unauthenticated):
            await access.caller(request())
        second = await access.caller(request(authorization=f"Bearer {key}"))
        return first, row, second

    first, row, second = asyncio.run(before_and_after())

    assert (first.name, first.scopes) == ("local", frozenset(SCOPES))
    assert (second.name, second.scopes) == (f"key:{row.key_id}", frozenset({"read"}))


def test_a_revoked_key_ends_and_the_service_does_not_open_again(keys, settings):
    async def revoke():
        row, key = keys.create("gone", ["read"], None)
        access = Access(keys, settings, read_seconds=0)
        assert (await access.caller(request(authorization=f"Bearer {key}"))).name == f"key:{row.key_id}"
        ended = keys.revoke(row.key_id).revoked_at
        assert keys.revoke(row.key_id).revoked_at == ended
        for asked in (request(authorization=f"Bearer {key}"), request()):
            with pytest.raises(Unauthenticated) as error:
                await access.caller(asked)
            yield error.value.found["reason"]

    async def all_of_it():
        return [reason async for reason in revoke()]

    assert asyncio.run(all_of_it()) == ["revoked", "missing"]


def test_an_expired_key_says_so(keys, settings):
    _, key = keys.create("old", ["read"], now() - timedelta(seconds=1))

    with pytest.raises(Unauthenticated, match="is expired"):
        known(keys, settings, request(authorization=f"Bearer {key}"))


def test_that_a_key_was_used_is_noted_once(keys, settings):
    row, key = keys.create("used", ["read"], None)

    async def twice():
        access = Access(keys, settings)
        await access.caller(request(authorization=f"Bearer {key}"))
        first = keys.list()[0].used_at
        await access.caller(request(authorization=f"Bearer {key}"))
        return first, keys.list()[0].used_at

    first, second = asyncio.run(twice())

    assert row.used_at is None
    assert first is not None
    assert first == second


def test_known_keys_outlast_a_catalog_that_is_away(settings):
    keys = keys_of(settings)
    row, key = keys.create("kept", ["read"], None)

    async def without_catalog():
        access = Access(keys, settings, read_seconds=0)
        with keys._database.write() as session:
            session.connection().exec_driver_sql("ALTER TABLE api_keys RENAME TO elsewhere")
        return await access.caller(request(authorization=f"Bearer {key}"))

    assert asyncio.run(without_catalog()).name == f"key:{row.key_id}"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (request(), None),
        (request(server=("::1", 8000), host="[::1]:8000"), None),
        (request(host="localhost:8000"), None),
        (request(server=("testserver", 80)), None),
        (request(origin="http://localhost:3000"), None),
        (request(origin="https://viewer.example"), None),
        (request(x_forwarded_for="10.0.0.1"), "x-forwarded-for"),
        (request(forwarded="for=10.0.0.1"), "forwarded"),
        (request(via="1.1 proxy"), "via"),
        (request(server=("/run/keyslice.sock", None)), "unix socket"),
        (request(server=("10.0.0.7", 8000)), "10.0.0.7"),
        (request(server=("::ffff:10.0.0.7", 8000)), "10.0.0.7"),
        (request(host="rebound.example"), "DNS rebinding"),
        (request(host="127.0.0.1.evil.example:8000"), "DNS rebinding"),
        (request(host="["), "DNS rebinding"),
        (request(origin="https://evil.example"), "another origin"),
        (request(origin="null"), "another origin"),
    ],
)
def test_an_open_service_tells_callers_here_from_others(asked, said):
    found = from_elsewhere(asked, "https://viewer.example, https://other.example")

    assert (found is None) == (said is None)
    assert said is None or said in found


def test_an_open_service_serves_no_proxy(settings):
    with TestClient(create_app(settings)) as http:
        direct = http.get("/v1/series")
        forwarded = http.get("/v1/series", headers={"X-Forwarded-For": "10.0.0.1"})

    assert direct.status_code == 200
    assert (forwarded.status_code, forwarded.json()["reason"]) == (401, "not_local")
    assert "keyslice keys create" in forwarded.json()["detail"]


def test_an_open_service_serves_no_unix_socket(settings, tmp_path):
    path = str(tmp_path / "api.sock")
    with (
        serving(settings, uds=path),
        httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://127.0.0.1") as http,
    ):
        assert http.get("/healthz").status_code == 200
        assert http.get("/v1/series").status_code == 401


@pytest.mark.parametrize("exposed", [{"host": "0.0.0.0"}, {"host": "::"}, {"public_url": "https://ct.example/"}])
def test_beyond_loopback_nothing_starts_without_a_key_that_can_be_used(tmp_path, exposed):
    settings = settings_of(tmp_path, **exposed)
    keys = keys_of(settings)
    keys.create("old", ["read"], now() - timedelta(seconds=1))
    keys.revoke(keys.create("revoked", ["read"], None)[0].key_id)

    with pytest.raises(NoUsableKey, match="keyslice keys create"), TestClient(create_app(settings)):
        pass

    _, key = keys.create("first", ["read"], None)
    with TestClient(create_app(settings)) as http:
        assert http.get("/v1/series").status_code == 401
        assert http.get("/v1/series", headers=bearer(key)).status_code == 200


def test_each_key_has_a_bucket_of_its_own():
    allowance = Allowance(per_minute=2)
    for _ in range(2):
        allowance.take("a", now=100.0)

    with pytest.raises(TooManyRequests) as error:
        allowance.take("a", now=100.0)
    allowance.take("b", now=100.0)
    allowance.take("a", now=130.0)
    with pytest.raises(TooManyRequests):
        allowance.take("a", now=130.0)

    assert error.value.found == {"retry_after_seconds": 30}


def test_an_unlimited_caller_is_never_refused():
    allowance = Allowance(None)
    for _ in range(1000):
        allowance.take("a", now=0.0)


def test_too_many_requests_are_told_when_to_come_back(tmp_path):
    settings = settings_of(tmp_path, rate_limit=1)
    one, two = (keys_of(settings).create("x", ["read"], None)[1] for _ in range(2))

    with TestClient(create_app(settings)) as http:
        answers = [http.get("/v1/series", headers=bearer(key)) for key in (one, one, two)]

    assert [answer.status_code for answer in answers] == [200, 429, 200]
    assert answers[1].json()["type"] == "urn:keyslice:too-many-requests"
    assert 0 < int(answers[1].headers["retry-after"]) <= 60


def run(*arguments: str, **environment: str):
    return CliRunner().invoke(command, arguments, env=environment)


def test_keys_are_made_listed_and_revoked_by_command(tmp_path):
    here = {"KEYSLICE_DATA_DIR": str(tmp_path / "data")}
    made = run(
        "keys", "create", "--name", "reader", "--scope", "read", "--scope", "metrics", "--expires", "90d", **here
    )
    key = made.stdout.strip()
    key_id = read_token(key)[0]
    listed = run("keys", "list", "--json", **here)
    table = run("keys", "list", **here)
    revoked = run("keys", "revoke", key_id, **here)
    after = json.loads(run("keys", "list", "--json", **here).stdout)

    (row,) = json.loads(listed.stdout)
    assert (row["key_id"], row["name"], row["scopes"], row["state"]) == (
        key_id,
        "reader",
        ["metrics", "read"],
        "active",
    )
    assert row["expires_at"] > row["created_at"]
    assert key.split("_")[2] not in listed.stdout + table.stdout + made.stderr
    assert key_id in table.stdout
    assert revoked.exit_code == 0
    assert [each["state"] for each in after] == ["revoked"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["create", "--name", "x", "--scope", "everything"], "no scope 'everything'"),
        (["create", "--name", "x", "--scope", "read", "--expires", "soon"], "expected a number and d, h or m"),
        (["revoke", "0" * 12], "no key"),
    ],
)
def test_a_keys_command_that_is_wrong_says_so(tmp_path, arguments, said):
    answer = run("keys", *arguments, KEYSLICE_DATA_DIR=str(tmp_path))

    assert answer.exit_code == 2
    assert said in answer.stderr


def test_our_own_commands_send_the_key_of_the_settings(place, tmp_path):
    here = {"KEYSLICE_DATA_DIR": str(tmp_path)}

    without = run("heads", "--service", place.address, **here)
    with_key = run("heads", "--service", place.address, **here, KEYSLICE_API_KEY=place.keys["read"])
    reader = run("embed", str(tmp_path), "--service", place.address, **here, KEYSLICE_API_KEY=place.keys["read"])

    assert without.exit_code == 1
    assert "401: no key came with it" in without.stderr
    assert "KEYSLICE_API_KEY" in without.stderr
    assert with_key.exit_code == 0, with_key.stderr
    assert reader.exit_code == 1
    assert "403: key" in reader.stderr and "has read, expected write" in reader.stderr


def test_settings_do_not_show_their_key():
    assert "secret" not in repr(Settings(api_key="ks_secret"))
