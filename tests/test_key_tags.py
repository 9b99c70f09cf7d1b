"""Keys that see only series with some tag: what they are shown, and that no route shows them more."""

import re
from collections.abc import Iterator
from typing import get_args

import numpy as np
import pytest
from fastapi.testclient import TestClient
from searching import random_bag
from typer.testing import CliRunner

from service.app import create_app
from service.cli import app as command
from service.indexing import index_bags
from service.settings import Settings
from service.storage.api_keys import Scope
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores, open_stores

DIM = 1280
GEOMETRY = {"slices": 3, "rows": 32, "columns": 32, "pixel_spacing_mm": [1.0, 1.0], "slice_spacing_mm": 1.0}
GEOMETRY |= {"z_mm": [0.0, 2.0], "tilt_degrees": 0.0, "kernels": []}
MINE = ["1.2.0", "1.2.1"]
HIDDEN = ["1.2.2", "1.2.3", "1.2.4"]
TAGS = {"1.2.0": ["liver"], "1.2.1": ["spleen", "other"], "1.2.2": ["lung"]}


def embed(stores: Stores, encoder_id: str, number: int) -> None:
    uid = f"1.2.{number}"
    key = EmbeddingKey(uid, encoder_id)
    stores.catalog.receive([Arrival(uid, f"1.{number}", f"PATIENT-{number}")], encoder_id)
    positions = {"sop_uids": [f"{uid}.{k}" for k in range(3)], "z_mm": [0.0, 1.0, 2.0]}
    stores.bags.put(key, "first", random_bag(number, 3, DIM), {"windows": ["abdomen", "lung"], **positions})
    stores.catalog.commit(key, "first", 3, {"status": "accepted", "findings": [], "set_aside": []}, GEOMETRY)
    stores.tags.put(uid, TAGS.get(uid, []))


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("tagged"), broker_url="memory://", sweep_seconds=1e6)


@pytest.fixture(scope="module")
def stores(settings: Settings) -> Iterator[Stores]:
    opened = open_stores(settings)
    for number in range(5):
        embed(opened, settings.own_encoder_id(), number)
    index_bags(opened, settings, "worker")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def http(settings: Settings, stores: Stores) -> Iterator[TestClient]:
    """As somebody who may do everything with series of the liver or the spleen."""
    _, key = stores.api_keys.create("liver", get_args(Scope), None, tags=["liver", "spleen"])
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


@pytest.fixture(scope="module")
def anyone(settings: Settings, stores: Stores) -> Iterator[TestClient]:
    _, key = stores.api_keys.create("all", ["read"], None)
    with TestClient(create_app(settings), headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


def test_the_list_has_only_their_series(http, anyone):
    def listed(client, **query):
        return [each["series_uid"] for each in client.get("/v1/series", params=query).json()["series"]]

    assert listed(http) == MINE
    assert listed(http, tag="lung") == listed(http, series_uid="1.2.3") == []
    assert listed(http, tag="other") == ["1.2.1"]
    assert listed(anyone) == [*MINE, *HIDDEN]


@pytest.mark.parametrize("uid", HIDDEN)
def test_another_series_is_not_found_as_if_it_were_not_here(http, anyone, uid):
    answer, gone = http.get(f"/v1/series/{uid}"), http.get("/v1/series/9.9")

    assert (answer.status_code, answer.json()["type"]) == (404, gone.json()["type"])
    assert answer.json()["detail"] == gone.json()["detail"].replace("9.9", uid)
    assert http.get(f"/v1/series/{uid}/embeddings").status_code == 404
    assert anyone.get(f"/v1/series/{uid}").status_code == 200


def test_one_of_theirs_is_shown(http):
    assert http.get("/v1/series/1.2.0").json()["series_uid"] == "1.2.0"
    assert np.array(http.get("/v1/series/1.2.0/embeddings").json()["embeddings"]).shape == (3, 2, DIM)
    assert http.get("/v1/series/1.2.0/tags").json() == {"tags": ["liver"]}


def test_a_search_hits_only_their_series_and_asks_only_about_them(http, anyone):
    def hits(client, **others):
        query = {"series_uid": "1.2.0", "slice": 0, "window": "lung", "k": 50, **others}
        return client.post("/v1/search", json=query)

    assert {each["series_uid"] for each in hits(anyone).json()["hits"]} >= set(HIDDEN)
    assert {each["series_uid"] for each in hits(http).json()["hits"]} == set(MINE)
    assert hits(http, filters={"series_uid": HIDDEN}).json()["hits"] == []
    assert hits(http, series_uid="1.2.3").status_code == 404
    assert hits(anyone, series_uid="1.2.3").status_code == 200
    vector = {"vector": [1.0] * DIM, "encoder": "efficientnet_lite0", "k": 50}
    assert {each["series_uid"] for each in http.post("/v1/search", json=vector).json()["hits"]} == set(MINE)
    several = {"slices": [{"series_uid": uid, "slice": 0, "window": "lung"} for uid in ("1.2.0", "1.2.4")]}
    assert http.post("/v1/search", json=several).status_code == 404


@pytest.mark.parametrize("by", ["mean", "late"])
def test_series_like_theirs(http, by):
    found = http.post("/v1/search/series", json={"series_uid": "1.2.0", "by": by, "k": 50})

    assert {each["series_uid"] for each in found.json()["hits"]} == {"1.2.1"}
    assert http.post("/v1/search/series", json={"series_uid": "1.2.3", "by": by}).status_code == 404


def test_features_are_of_their_series(http, anyone):
    def series(client):
        answer = client.get("/v1/features", params={"format": "parquet"})
        return answer.headers["x-keyslice-series"] if answer.status_code == 200 else answer.text

    assert series(http) == "2"
    assert series(anyone) == "5"


def test_a_tag_that_is_given_or_taken_counts_at_once(http, stores):
    stores.tags.put("1.2.4", ["liver"])
    assert http.get("/v1/series/1.2.4").status_code == 200
    stores.tags.put("1.2.4", [])
    assert http.get("/v1/series/1.2.4").status_code == 404


def test_no_other_route_answers_them(http):
    """Whatever is not about one of their series by its path, and does not narrow what it answers, is refused."""
    narrow = {
        ("get", "/v1/series"),
        ("get", "/v1/features"),
        ("get", "/v1/features/sample"),
        ("get", "/v1/encoders"),
        ("post", "/v1/search"),
        ("post", "/v1/search/image"),
        ("post", "/v1/search/series"),
    }
    paths = http.get("/openapi.json").json()["paths"]
    for method, path in [(method, path) for path, methods in paths.items() for method in methods]:
        if path in ("/healthz", "/readyz") or (method, path) in narrow:
            continue
        url = re.sub(r"\{(series|series_uid)\}", "1.2.3", path)
        answer = http.request(method, re.sub(r"\{\w+\}", "1", url))
        expected = (404, "urn:keyslice:series-not-found") if url != path else (403, "urn:keyslice:beyond-key")
        assert (answer.status_code, answer.json()["type"]) == expected, (method, path)


def test_the_command_makes_and_shows_them(tmp_path):
    def run(*arguments: str) -> str:
        done = CliRunner().invoke(command, arguments, env={"KEYSLICE_DATA_DIR": str(tmp_path), "COLUMNS": "200"})
        assert done.exit_code == 0, done.output
        return done.output

    made = run("keys", "create", "--name", "ward", "--scope", "read", "--tag", "liver", "--tag", "spleen")
    assert "series tagged liver or spleen" in made
    assert "liver, spleen" in run("keys", "list")
    assert '"tags": [\n   "liver"' in run("keys", "list", "--json")
