"""The catalog's states, on SQLite and on PostgreSQL."""

import threading
import unittest.mock
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from archived import archived_file

from models.health import BagHealth
from service.errors import NotEmbeddedYet, OtherEncoder, PatientNotFound, SeriesNotFound
from service.storage.catalog import Arrival, Quiet
from service.storage.cohorts import CohortFilter
from service.storage.indexes import Indexed
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores
from service.storage.tables import now

ENCODER = "toy@0123456789ab"
ARRIVAL = Arrival("1.2.3", study_uid="1.2", patient_id="P1")
KEY = EmbeddingKey("1.2.3", ENCODER)
STALE, ATTEMPTS = 60.0, 3


def archive(stores: Stores, series_uid: str, *sop_uids: str) -> None:
    for sop_uid in sop_uids:
        staged = archived_file(stores, series_uid, sop_uid).parents[2] / "staged"
        staged.write_bytes(b"DICM")
        stores.archive.add(series_uid, [(sop_uid, staged)])


def commit(stores: Stores, key: EmbeddingKey = KEY) -> str:
    content, slices = stores.archive.content(key.series_uid)
    stores.catalog.commit(key, content, slices, {"status": "accepted"}, {"slices": slices})
    return content


def indexed(content: str) -> Indexed:
    return Indexed(KEY, content, rows=4, mean=np.ones(8, np.float16), health=BagHealth(2.8, 0.0, 1.0))


@pytest.fixture
def received(stores: Stores) -> Stores:
    archive(stores, "1.2.3", "1", "2")
    stores.catalog.receive([ARRIVAL], ENCODER)
    return stores


def test_states_follow_each_other(received):
    catalog, seen = received.catalog, []
    seen.append(catalog.series("1.2.3").state)
    catalog.sent([KEY])
    seen.append(catalog.series("1.2.3").state)
    assert catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    seen.append(catalog.series("1.2.3").state)
    content = commit(received)
    seen.append(catalog.series("1.2.3").state)
    received.indexes.indexed([indexed(content)])
    seen.append(catalog.series("1.2.3").state)

    assert seen == ["received", "queued", "embedding", "embedded", "indexed"]


def test_the_same_upload_again_changes_nothing(received):
    received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    content = commit(received)
    received.indexes.indexed([indexed(content)])

    job = received.catalog.receive([ARRIVAL], ENCODER)

    assert received.catalog.series("1.2.3").state == "indexed"
    assert received.catalog.waiting(job) == []


def test_a_claim_is_had_by_one_of_many(received):
    answers = []
    claim = lambda k: answers.append(received.catalog.claim(KEY, f"worker-{k}", STALE, ATTEMPTS))  # noqa: E731
    threads = [threading.Thread(target=claim, args=(k,)) for k in range(8)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(answers) == [False] * 7 + [True]


def test_a_silent_workers_claim_passes_on(received):
    assert received.catalog.claim(KEY, "dead", STALE, ATTEMPTS)
    assert not received.catalog.claim(KEY, "living", STALE, ATTEMPTS)
    assert received.catalog.claim(KEY, "living", 0.0, ATTEMPTS)


def test_the_sweep_finds_silent_workers_and_lost_messages(received):
    catalog = received.catalog
    assert catalog.lost(STALE, queue_is_empty=True) == []
    assert catalog.lost(0.0, queue_is_empty=True) == [KEY]
    assert catalog.lost(0.0, queue_is_empty=False) == []  # queued now, and its message may be in the queue
    catalog.claim(KEY, "dead", STALE, ATTEMPTS)
    assert catalog.lost(0.0, queue_is_empty=False) == [KEY]
    assert catalog.series("1.2.3").state == "queued"


def test_a_series_that_kills_its_workers_is_given_up(received):
    for _ in range(ATTEMPTS):
        assert received.catalog.claim(KEY, "dead", 0.0, ATTEMPTS)

    assert not received.catalog.claim(KEY, "living", 0.0, ATTEMPTS)
    series = received.catalog.series("1.2.3")
    assert (series.state, series.error) == ("failed", "given up after 3 attempts: the worker died")


def test_a_failed_series_is_retried_on_the_next_post(received):
    received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    received.catalog.fail(KEY, "failed", "disk")

    job = received.catalog.receive([ARRIVAL], ENCODER)

    assert received.catalog.waiting(job) == [KEY]


def test_a_rejected_series_is_not_retried_before_it_changes(received):
    received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    received.catalog.fail(KEY, "rejected", "nothing decodes", {"status": "rejected"})

    assert received.catalog.waiting(received.catalog.receive([ARRIVAL], ENCODER)) == []
    archive(received, "1.2.3", "3")
    assert received.catalog.waiting(received.catalog.receive([ARRIVAL], ENCODER)) == [KEY]


def test_slices_that_come_during_an_embedding_start_another(received):
    received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    old, _ = received.archive.content("1.2.3")
    archive(received, "1.2.3", "3")
    received.catalog.receive([ARRIVAL], ENCODER)

    received.catalog.commit(KEY, old, 2, {"status": "accepted"}, {"slices": 2})

    assert received.catalog.series("1.2.3").state == "received"
    assert received.catalog.embedding("1.2.3", ENCODER).content == old


def test_what_is_embedded_and_not_indexed_is_listed_until_it_is(received):
    assert received.indexes.not_indexed(10) == []
    received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    content = commit(received)
    assert received.indexes.not_indexed(10) == [(KEY, content)]
    received.indexes.indexed([indexed(content)])
    assert received.indexes.not_indexed(10) == []


def test_an_embedding_is_there_committed_or_not_at_all(received):
    with pytest.raises(SeriesNotFound):
        received.catalog.embedding("9.9", ENCODER)
    with pytest.raises(OtherEncoder):
        received.catalog.embedding("1.2.3", "toy@ffffffffffff")
    with pytest.raises(NotEmbeddedYet):
        received.catalog.embedding("1.2.3", ENCODER)
    content = commit(received)
    assert received.catalog.embedding("1.2.3", ENCODER).content == content


def test_a_patient_is_one_by_their_id(received):
    archive(received, "1.2.4", "1")
    received.catalog.receive([replace(ARRIVAL, series_uid="1.2.4")], ENCODER)
    for uid in ("1.2.3", "1.2.4"):
        commit(received, EmbeddingKey(uid, ENCODER))

    rows = received.catalog.patient_embeddings("P1", ENCODER)

    assert [row.series_uid for row in rows] == ["1.2.3", "1.2.4"]
    assert received.catalog.series("1.2.3").patient_key == received.catalog.series("1.2.4").patient_key
    assert received.catalog.series("1.2.3").patient_key != "P1"
    with pytest.raises(PatientNotFound):
        received.catalog.patient_embeddings("P2", ENCODER)


def test_many_uploads_of_a_new_series_at_once_make_one_row(stores):
    archive(stores, "1.2.3", "1", "2")
    errors = []

    def receive() -> None:
        try:
            stores.catalog.receive([ARRIVAL], ENCODER)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=receive) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    listed = stores.cohorts.series(CohortFilter(), limit=10)
    assert [row.series_uid for row in listed] == ["1.2.3"]


def test_a_lease_has_one_holder_until_it_ends(stores):
    assert stores.leases.take("index", "a", 60)
    assert stores.leases.take("index", "a", 60)
    assert not stores.leases.take("index", "b", 60)
    stores.leases.release("index", "b")
    assert not stores.leases.take("index", "b", 60)
    stores.leases.release("index", "a")
    assert stores.leases.take("index", "b", -1)
    assert stores.leases.take("index", "a", 60)


def test_the_schema_is_what_the_tables_say(stores):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from service.storage.tables import Row

    with stores.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Row.metadata) == []


QUIET = Quiet(seconds=60.0, limit_seconds=600.0)


def lost(stores: Stores) -> list[EmbeddingKey]:
    return stores.catalog.lost(STALE, queue_is_empty=True)


def test_a_series_that_comes_by_network_is_sent_for_after_its_quiet_time(stores):
    archive(stores, "1.2.3", "1")
    stores.catalog.collect([ARRIVAL], ENCODER, QUIET)
    before = lost(stores)
    with unittest.mock.patch("service.storage.catalog.now", lambda: now() + timedelta(seconds=61)):
        after = lost(stores)

    assert (before, after) == ([], [KEY])


def test_every_further_slice_begins_the_quiet_time_anew_up_to_the_limit(stores):
    due, start = [], now()
    for number in range(4):
        archive(stores, "1.2.3", str(number))
        moment = start + timedelta(seconds=50 * number)
        with unittest.mock.patch("service.storage.catalog.now", lambda moment=moment: moment):
            stores.catalog.collect([ARRIVAL], ENCODER, Quiet(60.0, limit_seconds=130.0))
        due.append((stores.catalog.series("1.2.3").whole_at - start).total_seconds())

    assert due == [60, 110, 130, 210]  # the fourth came after the limit, so it begins another time of waiting


def test_a_slice_that_is_here_already_does_not_prolong_the_wait(stores):
    archive(stores, "1.2.3", "1")
    stores.catalog.collect([ARRIVAL], ENCODER, QUIET)
    first = stores.catalog.series("1.2.3").whole_at
    stores.catalog.collect([ARRIVAL], ENCODER, QUIET)

    assert stores.catalog.series("1.2.3").whole_at == first


def test_the_last_expected_slice_makes_a_series_whole(stores):
    arrival = replace(ARRIVAL, about={"expected": 2})
    archive(stores, "1.2.3", "1")
    stores.catalog.collect([arrival], ENCODER, QUIET)
    one = lost(stores)
    archive(stores, "1.2.3", "2")
    stores.catalog.collect([arrival], ENCODER, QUIET)

    assert (one, lost(stores)) == ([], [KEY])


def test_a_series_said_to_be_complete_is_sent_for_at_once(stores):
    archive(stores, "1.2.3", "1")
    stores.catalog.collect([ARRIVAL], ENCODER, QUIET)

    assert stores.catalog.complete("1.2.3") == [KEY]
    assert stores.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    with pytest.raises(SeriesNotFound):
        stores.catalog.complete("1.2.4")


def test_a_series_that_grew_since_it_was_sent_for_is_not_embedded_in_part(received):
    received.catalog.sent([KEY])
    archive(received, "1.2.3", "3")
    received.catalog.collect([ARRIVAL], ENCODER, QUIET)

    assert not received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    assert received.catalog.series("1.2.3").state == "received"


def test_slices_that_come_by_network_later_make_another_embedding_of_the_whole_series(received):
    received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    commit(received)
    archive(received, "1.2.3", "3")
    received.catalog.collect([ARRIVAL], ENCODER, Quiet(0.0, 600.0))

    assert lost(received) == [KEY]
    assert received.catalog.claim(KEY, "worker", STALE, ATTEMPTS)
    commit(received)
    assert received.catalog.embedding("1.2.3", ENCODER).slices == 3


def test_an_upload_of_what_came_by_network_already_makes_a_waiting_series_whole_and_changes_no_other(stores):
    archive(stores, "1.2.3", "1")
    stores.catalog.collect([ARRIVAL], ENCODER, QUIET)
    stores.catalog.receive([ARRIVAL], ENCODER)
    first = stores.catalog.series("1.2.3").whole_at
    stores.catalog.receive([ARRIVAL], ENCODER)

    assert first <= now()
    assert stores.catalog.series("1.2.3").whole_at == first
