"""What Prometheus reads at /metrics."""

from datetime import timedelta

import pytest
from posting import embed, slice_files
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from test_catalog import ARRIVAL, ENCODER, KEY, STALE, archive, commit

from models.ct.phantom import Identity
from service.metrics import FromStores
from service.queue import Queue
from service.settings import Settings
from service.storage.catalog import Quiet
from service.storage.figures import EmbeddingCount
from service.storage.tables import now

PATIENT = "QXZCANARY-METRICS"


def figures(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_service_counts_what_it_holds_and_times_its_answers(http):
    encoder = next(each for each in http.get("/v1/encoders").json()["encoders"] if each["default"])["encoder_id"]
    state, slices = frozenset({("encoder", encoder), ("state", "indexed")}), frozenset({("encoder", encoder)})
    before = figures(http.get("/metrics").text)
    embed(http, slice_files(Identity(PATIENT), count=4, seed=71))
    http.get(f"/v1/patients/{PATIENT}/predictions?head=none")
    http.request("PROPFIND", f"/{PATIENT}")
    answer = http.get("/metrics")
    after = figures(answer.text)

    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert after["keyslice_embeddings", state] - before.get(("keyslice_embeddings", state), 0) == 1
    assert after["keyslice_slices_embedded", slices] - before.get(("keyslice_slices_embedded", slices), 0) == 4
    route = frozenset({("method", "GET"), ("route", "/v1/patients/{patient_id}/predictions"), ("status", "404")})
    answered = "keyslice_http_request_seconds_count", route
    assert after[answered] - before.get(answered, 0) == 1
    unmatched = {("method", "none"), ("route", "none"), ("status", "404")}
    assert after["keyslice_http_request_seconds_count", frozenset(unmatched)] >= 1
    assert after["keyslice_catalog_up", frozenset()] == after["keyslice_broker_up", frozenset()] == 1
    assert PATIENT not in answer.text


def test_a_broker_or_catalog_that_is_away_is_said_and_the_rest_is_told(stores, tmp_path):
    queue = Queue(Settings(broker_url="redis://127.0.0.1:1/0"), stores)
    registry = CollectorRegistry()
    registry.register(FromStores(stores, queue, tmp_path))

    assert registry.get_sample_value("keyslice_broker_up") == 0
    assert registry.get_sample_value("keyslice_catalog_up") == 1
    assert registry.get_sample_value("keyslice_disk_free_bytes") > 0


def test_embeddings_are_counted_by_state(stores):
    archive(stores, "1.2.3", "1", "2")
    stores.catalog.receive([ARRIVAL], ENCODER)
    waiting = stores.figures.embedding_counts()
    stores.catalog.claim(KEY, "worker", STALE, 3)
    commit(stores)

    assert waiting == [EmbeddingCount(ENCODER, "received", 1, 0)]
    assert stores.figures.embedding_counts() == [EmbeddingCount(ENCODER, "embedded", 1, 2)]


@pytest.mark.parametrize("quiet_seconds", [0.0, 60.0])
def test_only_a_whole_series_is_waiting(stores, quiet_seconds):
    archive(stores, "1.2.3", "1")
    stores.catalog.collect([ARRIVAL], ENCODER, Quiet(quiet_seconds, 600.0))
    oldest = stores.figures.oldest_waiting()

    assert (oldest is None) == (quiet_seconds > 0)
    assert oldest is None or timedelta(0) <= now() - oldest < timedelta(seconds=30)
