"""Nobody waits behind all that another has sent, and no more waits than may."""

import json

import httpx
import pytest
import redis
from posting import post, slice_files, tarred, wait
from serving import keys_of
from starlette.testclient import TestClient
from test_catalog import ENCODER, archive
from test_dicomweb import related

from models.ct.phantom import Identity
from service.app import create_app
from service.embedded import in_background
from service.errors import QueueFull
from service.queue import BEHIND, EMBED_SERIES, FAIR_SHARE, WORK, Queue
from service.settings import Settings
from service.storage.catalog import LOST_AT_ONCE, Arrival, Quiet
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

MANY = 48  # series


def arrive(stores: Stores, sender: str, count: int, first: int = 0) -> list[EmbeddingKey]:
    """Series of one upload."""
    uids = [f"1.2.{len(sender)}.{number}" for number in range(first, first + count)]
    for uid in uids:
        archive(stores, uid, "1")
    arrivals = [Arrival(uid, study_uid="1.2", patient_id="P1", sender=sender) for uid in uids]
    return stores.catalog.waiting(stores.catalog.receive(arrivals, ENCODER))


@pytest.fixture
def queue(stores, broker):
    opened = Queue(Settings(broker_url=broker, stale_seconds=0.001, sweep_seconds=3600), stores)
    yield opened
    opened.close()
    with redis.Redis.from_url(broker.replace("redis+socket", "unix")) as client:
        client.flushdb()


@pytest.fixture
def asked(broker):
    """Counts the embeddings that a lane asks for."""

    def count(lane: str) -> int:
        with redis.Redis.from_url(broker.replace("redis+socket", "unix")) as client:
            return sum(json.loads(each)["headers"]["task"] == EMBED_SERIES for each in client.lrange(lane, 0, -1))

    return count


@pytest.mark.parametrize("at_once", [20, 5, 1])
def test_a_sender_of_many_series_leaves_the_way_to_the_others_free(stores, queue, asked, at_once):
    for first in range(0, 20, at_once):
        queue.embed(arrive(stores, "key:many", at_once, first))
    queue.embed(arrive(stores, "key:few", 2))

    assert (asked(WORK), asked(BEHIND)) == (FAIR_SHARE + 2, 20 - FAIR_SHARE)
    assert queue.depth() == 22


def test_what_the_broker_lost_is_sent_in_the_same_turns(stores, queue, asked):
    arrive(stores, "key:many", 20)
    arrive(stores, "key:few", 2)

    queue.sweep()

    assert (asked(WORK), asked(BEHIND)) == (FAIR_SHARE + 2, 20 - FAIR_SHARE)


def test_of_more_than_are_sent_again_at_once_there_are_some_of_every_sender(stores, queue, asked):
    arrive(stores, "key:many", LOST_AT_ONCE + 5)
    arrive(stores, "key:few", 2)

    queue.sweep()

    assert asked(WORK) + asked(BEHIND) == LOST_AT_ONCE
    assert asked(WORK) == FAIR_SHARE + 2


def test_series_that_still_come_slice_by_slice_are_before_nobody(stores, queue, asked):
    coming = []
    for number in range(20):
        archive(stores, f"1.2.{number}", "1")
        coming.append(Arrival(f"1.2.{number}", study_uid="1.2", patient_id="P1", sender="aet:CT1"))
    stores.catalog.collect(coming[:17], ENCODER, Quiet(600.0, 600.0))
    stores.catalog.collect(coming[17:], ENCODER, Quiet(0.0, 600.0))

    queue.sweep()

    assert (asked(WORK), asked(BEHIND)) == (3, 0)
    assert stores.catalog.backlog("aet:CT1", 100) == 20


def test_what_a_worker_has_taken_or_given_up_waits_no_more(stores, queue, asked):
    keys = arrive(stores, "key:many", FAIR_SHARE + 2)
    for key in keys[:FAIR_SHARE]:
        assert stores.catalog.claim(key, "worker", 60, 3)
    assert stores.catalog.backlog("key:many", 100) == 2

    queue.embed(keys[FAIR_SHARE:])

    assert (asked(WORK), asked(BEHIND)) == (2, 0)


def test_series_that_come_slice_by_slice_are_their_senders(stores):
    archive(stores, "1.2.3", "1")
    arrival = Arrival("1.2.3", study_uid="1.2", patient_id="P1", sender="aet:CT1")

    stores.catalog.collect([arrival], ENCODER, Quiet(60.0, 600.0))

    assert (stores.catalog.backlog("aet:CT1", 100), stores.catalog.backlog("aet:CT2", 100)) == (1, 0)


def test_trainings_and_exports_wait_in_numbers_too(stores, monkeypatch):
    for place in ("heads", "exports"):
        monkeypatch.setattr(f"service.storage.{place}.MOST_WAITING", 2)
    for number in range(2):
        stores.heads.add(ENCODER, ["mass"], {}, {}, "lungs")
        stores.exports.add(f"file:///pacs/{number}", ENCODER, {"dry_run": False})

    with pytest.raises(QueueFull, match="2 heads wait"):
        stores.heads.add(ENCODER, ["mass"], {}, {}, "lungs")
    with pytest.raises(QueueFull, match="2 exports wait"):
        stores.exports.add("file:///pacs/2", ENCODER, {"dry_run": False})

    assert stores.exports.add("file:///pacs/1", ENCODER, {"dry_run": False})[1]  # one that is here is told all the same


def test_more_series_than_may_wait_are_refused_and_leave_nothing(tmp_path):
    settings = Settings(data_dir=tmp_path, broker_url="memory://", sweep_seconds=3600, max_waiting=1)
    first, second = Identity("FIRST"), Identity("SECOND")
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://127.0.0.1:8000") as http:
        assert post(http, slice_files(first, count=2)).status_code == 202

        refused = post(http, slice_files(second))
        by_network = http.post("/dicom-web/studies", **related([file for _, file in slice_files(second)]))
        begun = http.post("/dicom-web/studies", **related([file for _, file in slice_files(first)]))

        for answer in (refused, by_network):
            assert (answer.status_code, answer.json()["type"]) == (429, "urn:keyslice:queue-full")
            assert (answer.json()["waiting"], answer.headers["retry-after"]) == (1, "60")
        assert begun.status_code == 200  # a series that has begun to come comes to its end
        assert http.get(f"/v1/series/{first.series_uid}").json()["received"] == 6
        assert http.get(f"/v1/series/{second.series_uid}").status_code == 404
    assert not [*(tmp_path / "staging").iterdir()]
    assert not [*(tmp_path / "archive").rglob(f"*{second.series_uid}*")]


def test_trainings_leave_the_worker_to_the_series(tmp_path):
    options = {"epochs": "10000", "patience": "10000", "folds": "2", "batch_size": "2"}
    with in_background(tmp_path) as running, httpx.Client(base_url=running.address, timeout=120) as http:
        for number in range(4):
            wait(http, post(http, slice_files(Identity(f"P{number}"), count=2)).raise_for_status().json()["job_id"])
        labels = "patient_id,bright\n" + "".join(f"P{number},{number % 2}\n" for number in range(4))
        trainings = [
            http.post("/v1/heads", files={"labels": labels}, data=options).raise_for_status().json()["job_id"]
            for _ in range(3)
        ]
        job = post(http, slice_files(Identity("LATER"))).raise_for_status().json()["job_id"]

        assert wait(http, job)["state"] == "done"
        assert {http.get(f"/v1/jobs/{each}").json()["state"] for each in trainings} <= {"waiting", "running"}
        for each in trainings:
            http.post(f"/v1/jobs/{each}/cancel").raise_for_status()


def test_one_series_of_one_key_is_done_long_before_the_many_of_another(tmp_path):
    keys = keys_of(Settings(data_dir=tmp_path))
    many, few = (keys.create(name, ["read", "write"], None)[1] for name in ("many", "few"))
    files = [
        (f"{number}/{name}", content)
        for number in range(MANY)
        for name, content in slice_files(Identity("MANY", series=str(number)), count=8, seed=number)
    ]
    with in_background(tmp_path) as running, httpx.Client(base_url=running.address, timeout=120) as http:
        http.headers["Authorization"] = f"Bearer {many}"
        flood = post(http, [("many.tar", tarred(files))]).raise_for_status().json()["job_id"]
        http.headers["Authorization"] = f"Bearer {few}"
        job = post(http, slice_files(Identity("FEW"))).raise_for_status().json()["job_id"]

        assert wait(http, job)["state"] == "done"

        embedded = [each["state"] in ("embedded", "indexed") for each in http.get(f"/v1/jobs/{flood}").json()["series"]]
        assert len(embedded) == MANY
        assert sum(embedded) <= MANY / 2
