"""The service whose stores lie in a bucket: POST, prediction, erasure, and while the bucket is away."""

import json
from collections import Counter

import httpx
import pytest
from buckets import NAME
from posting import post, slice_files, wait
from searching import Made, embed_made, random_bag
from starlette.testclient import TestClient
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service.app import create_app
from service.cli import app
from service.embedded import in_background
from service.erasing import Eraser
from service.queue import Queue
from service.settings import Settings
from service.storage.keys import EmbeddingKey
from service.storage.stores import open_stores
from workers import pipeline

ENCODER = Settings().own_encoder_id()
STORE = f"s3://{NAME}/keyslice"
UID = "1.2.1"


class NoMessages(Queue):
    """Without a broker none could be forgotten."""

    def forget(self, series_uids):
        return 0


def stored(s3) -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket=NAME).get("Contents", [])]


def test_from_a_post_to_a_prediction_to_an_erasure(s3, tmp_path):
    data, identities = tmp_path / "data", [Identity(f"BUCKET-{k}") for k in range(4)]
    quick = {"KEYSLICE_OBJECT_STORE": STORE, "KEYSLICE_SWEEP_SECONDS": "1"}
    with in_background(data, **quick) as running, httpx.Client(base_url=running.address, timeout=120) as http:
        for k, identity in enumerate(identities):
            job = post(http, slice_files(identity, count=3, seed=k)).json()["job_id"]
            assert wait(http, job)["state"] == "done"
        places = Counter(key.split("/")[1] for key in stored(s3))
        assert places.keys() == {"archive", "bags", "index"}
        assert places["archive"] == 3 * len(identities)
        assert places["bags"] == 2 * len(identities)

        picture = http.get(f"/v1/series/{identities[0].series_uid}/slices/1/image").raise_for_status()
        assert picture.content.startswith(b"\x89PNG")
        query = {"series_uid": identities[0].series_uid, "slice": 1, "window": "lung", "k": 2}
        hits = http.post("/v1/search", json=query).raise_for_status().json()["hits"]
        assert (hits[0]["series_uid"], hits[0]["slice"]) == (identities[0].series_uid, 1)
        table = "patient_id,odd\n" + "".join(f"{each.patient_id},{k % 2}\n" for k, each in enumerate(identities))
        asked = {"folds": "2", "epochs": "2", "batch_size": "2"}
        answer = http.post("/v1/heads", files={"labels": ("labels.csv", table.encode())}, data=asked)
        assert wait(http, answer.raise_for_status().json()["job_id"])["state"] == "done", answer.text
        predicted = http.get(
            f"/v1/patients/{identities[0].patient_id}/predictions", params={"head": answer.json()["head_id"]}
        )
        assert 0 <= predicted.raise_for_status().json()["probabilities"]["odd"] <= 1
        assert http.get("/readyz").json()["bags"] is True

        for identity in identities:
            receipt = http.delete(f"/v1/patients/{identity.patient_id}").raise_for_status().json()
            assert receipt["removed"]["bags"] == 1

        assert stored(s3) == []
        assert not [name for name in ("archive", "bags", "index") if (data / name).exists()]


@pytest.fixture
def settings(s3, tmp_path, monkeypatch):
    """Of stores with one series whose bag lies in the bucket."""
    monkeypatch.setenv("KEYSLICE_OBJECT_STORE", STORE)
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path / "data"))
    settings = Settings(broker_url="redis://127.0.0.1:1/0", sweep_seconds=3600)
    stores = open_stores(settings)
    embed_made(stores, Made(UID, random_bag(0)), ENCODER)
    stores.close()
    return settings


@pytest.fixture
def away(settings, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        yield settings


class TestWhileTheBucketIsAway:
    def test_reads_are_refused_with_the_reason_and_the_service_is_not_ready(self, away):
        with TestClient(create_app(away)) as http:
            answer = http.get(f"/v1/series/{UID}/embeddings", params={"encoder": ENCODER})
            ready = http.get("/readyz")

        assert (answer.status_code, answer.json()["type"]) == (503, "urn:keyslice:storage-unreachable")
        assert answer.json()["detail"] == "the object store does not answer: EndpointConnectionError"
        assert (ready.status_code, ready.json()["bags"], ready.json()["catalog"]) == (503, False, True)

    def test_an_erasure_goes_on_when_it_is_back(self, settings, s3, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
            with TestClient(create_app(settings)) as http:
                answer = http.delete(f"/v1/series/{UID}")
        assert (answer.status_code, answer.json()["type"]) == (503, "urn:keyslice:erasure-unfinished")
        assert "object store" in answer.json()["detail"]
        assert {key.split("/")[1] for key in stored(s3)} == {"archive", "bags"}

        stores = open_stores(settings)
        Eraser(stores, NoMessages(settings, stores), settings).sweep()

        assert stores.erasures.get(answer.json()["erasure_id"]).erased_at is not None
        assert stored(s3) == []
        stores.close()

    def test_a_check_ends_and_mends_nothing(self, away):
        result = CliRunner().invoke(app, ["check", "--repair"])

        assert result.exit_code == 1
        assert "the object store does not answer" in result.output
        stores = open_stores(away)
        assert stores.catalog.embedding(UID, ENCODER).content
        stores.close()

    def test_the_doctor_says_so(self, away):
        result = CliRunner().invoke(app, ["doctor", "--json"])

        found = {each["name"]: each for each in json.loads(result.stdout)}
        assert (found["bags"]["well"], found["archive"]["well"], found["disk"]["well"]) == (False, False, True)
        assert "does not answer" in found["bags"]["found"]

    def test_a_series_waits_and_does_not_fail(self, away):
        stores = open_stores(away)
        key = EmbeddingKey("1.2.2", ENCODER)

        class Worker:
            holder = "worker"

            def line(self, _):
                return None

        worker = Worker()
        worker.stores, worker.settings = stores, away
        embed_made(
            open_stores(away.model_copy(update={"object_store": None})), Made(key.series_uid, random_bag(1)), ENCODER
        )
        stores.inspection.withdraw(key, stores.catalog.embedding(*vars(key).values()).content, "received")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "_embed", lambda *_: stores.bags.exists(key, "c0"))
            for _ in range(away.max_attempts + 2):
                with pytest.raises(OSError, match="object store"):
                    pipeline.embed_series(key.series_uid, key.encoder_id, worker)

        row = stores.catalog.series(key.series_uid)
        assert (row.state, row.error) == ("queued", "StorageUnreachable")
        stores.close()


def test_the_doctor_leaves_nothing_and_says_that_versions_stay(settings, s3):
    before = stored(s3)

    found = {each["name"]: each for each in json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)}
    assert found["bags"]["well"], found["bags"]
    assert stored(s3) == before


@pytest.mark.parametrize("uri", ["/mnt/bags", "s3://", "dicomweb+https://pacs.example", "s3://Bucket/x", "gs://bucket"])
def test_what_is_no_bucket_is_refused(uri):
    with pytest.raises(ValueError, match="object_store"):
        Settings(object_store=uri)


def test_a_bucket_has_one_spelling_and_none_is_none():
    assert str(Settings(object_store="s3://bucket/keyslice").object_store) == "s3://bucket/keyslice/"
    assert Settings(object_store="").bucket is None
