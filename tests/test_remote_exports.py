"""Exports of a DICOMweb server and of a bucket: found, pulled, embedded, and what was not used is named."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from archived import archived
from buckets import NAME, deny, guarded, put
from posting import post, slice_files
from safetensors.torch import save_file
from web_answers import Answers, answer

from models.ct.phantom import Identity
from models.encoders.timm_import import timm
from service.embedded import Running
from service.errors import BadExport, BadQuery, PathNotAllowed
from service.exports import checked_uri
from service.pulls import asked_of
from service.queue import Queue
from service.schemas.pulls import PacsQuery
from service.settings import Settings
from service.storage.keys import EmbeddingKey
from workers import pipeline
from workers.exports import run_export
from workers.resources import Resources

ONE, AGAIN, TWO = Identity("remote one"), Identity("remote one", series="2"), Identity("remote two")
SLICES = 3
STALE_SECONDS = 0.2


class InThisProcess(Queue):
    """Embeds at once what it is asked to send; may be killed instead."""

    def __init__(self, worker: Resources) -> None:
        super().__init__(worker.settings, worker.stores)
        self.worker = worker
        self.embedded: list[str] = []
        self.dies_at: int | None = None

    def embed(self, keys: list[EmbeddingKey]) -> None:
        if len(self.embedded) == self.dies_at:
            self.dies_at = None
            raise Killed
        for key in keys:
            self.embedded.append(key.series_uid)
            pipeline.embed_series(key.series_uid, key.encoder_id, self.worker)


class Killed(BaseException):
    """Nothing that runs when a process is killed runs on this either, but for what Python does."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(timm.create_model("test_mambaout").state_dict(), folder / "test_mambaout.safetensors")
    return folder


@pytest.fixture
def queue(tmp_path: Path, weights: Path) -> Iterator[InThisProcess]:
    """A worker with a data directory of its own."""
    settings = Settings(
        data_dir=tmp_path / "data",
        weights_dir=weights,
        encoder="test_mambaout",
        decode_processes=1,
        stale_seconds=STALE_SECONDS,
        export_roots="s3://exports,dicomweb+http://127.0.0.1",
    )
    worker = Resources(settings)
    queue = InThisProcess(worker)
    yield queue
    queue.close()
    worker.close()


def start(queue: InThisProcess, uri: str, **asked: Any) -> str:
    options = {"dry_run": False, **asked_of(uri, asked.get("query"), asked.get("queries"))}
    row, _ = queue.worker.stores.exports.add(uri, queue.worker.own_encoder_id(), options)
    return row.export_id


def run(queue: InThisProcess, export_id: str) -> tuple[str, str | None]:
    """Bring it to its end; state and error."""
    stores = queue.worker.stores
    run_export(export_id, stores, queue.worker.settings, queue)
    row = stores.exports.get(export_id)
    return row.state, row.error


def series(queue: InThisProcess, export_id: str) -> dict[str, tuple[str, int | None, dict[str, int]]]:
    found = queue.worker.stores.contents.every_series(export_id)
    return {row.series_uid: (row.state, row.slices, dict(reasons)) for row, reasons in found}


def received(queue: InThisProcess, identity: Identity) -> set[bytes]:
    return {path.read_bytes() for path in archived(queue.worker.stores, identity.series_uid)}


@pytest.fixture(scope="module")
def files() -> dict[Identity, list[bytes]]:
    return {
        identity: [content for _, content in slice_files(identity, count=SLICES, seed=seed)]
        for seed, identity in enumerate((ONE, AGAIN, TWO))
    }


class TestOurOwnServiceAsThePacs:
    @pytest.fixture
    def pacs(self, service: Running, http, files) -> str:
        for contents in files.values():
            assert post(http, [(f"{k}.dcm", content) for k, content in enumerate(contents)]).status_code == 202
        return f"dicomweb+{service.address}/dicom-web"

    def test_what_answers_the_query_is_embedded_once(self, queue, pacs, files):
        table = "patient_id,date_from\nremote one,\n,yesterday\nremote*,20200101\n"
        export_id = start(queue, pacs, queries=table)

        assert run(queue, export_id) == ("done", None)

        assert series(queue, export_id) == {each.series_uid: ("embedded", SLICES, {}) for each in (ONE, AGAIN, TWO)}
        assert {each: received(queue, each) for each in files} == {each: set(found) for each, found in files.items()}
        assert [each["line"] for each in queue.worker.stores.exports.get(export_id).options["bad_rows"]] == [3]

        again = start(queue, pacs, query=PacsQuery(patient_id="remote*"))
        assert run(queue, again) == ("done", None)
        assert series(queue, again) == series(queue, export_id)
        assert Counter(queue.embedded) == dict.fromkeys([ONE.series_uid, AGAIN.series_uid, TWO.series_uid], 1)

    @pytest.mark.parametrize("dies_at", [0, 1, 2])
    def test_killed_at_any_series_it_goes_on_where_it_was(self, queue, pacs, dies_at):
        export_id = start(queue, pacs, query=PacsQuery(patient_id="remote*"))
        queue.dies_at = dies_at
        with pytest.raises(Killed):
            run(queue, export_id)
        time.sleep(STALE_SECONDS)  # until its worker counts as dead

        assert run(queue, export_id) == ("done", None)

        assert {state for state, _, _ in series(queue, export_id).values()} == {"embedded"}
        assert Counter(queue.embedded) == dict.fromkeys([ONE.series_uid, AGAIN.series_uid, TWO.series_uid], 1)

    def test_callers_name_servers_below_the_roots_alone(self, http, pacs):
        answer = http.post("/v1/exports", json={"uri": pacs, "query": {"patient_id": "remote one"}})

        assert (answer.status_code, answer.json()["type"]) == (403, "urn:keyslice:path-not-allowed")


class TestServersThatRefuse:
    def test_the_export_fails_with_the_reason(self, queue):
        with Answers(answer(403)) as it:
            uri = f"dicomweb+{it.url}"
            export_id = start(queue, uri, query=PacsQuery(patient_id="Jane"))

            assert run(queue, export_id) == ("failed", "the server answers 403: these credentials may not read this")

    def test_a_query_that_is_refused_is_named_and_the_others_go_on(self, queue):
        with Answers(answer(400), answer(204)) as it:
            export_id = start(queue, f"dicomweb+{it.url}", queries="patient_id\nJane\nJoe\n")

            assert run(queue, export_id) == ("done", None)

        (row,) = queue.worker.stores.contents.files_aside(export_id, series_uid=None, after=None, limit=9)
        assert (row.name, row.reason, row.detail) == (
            b"query 1",
            "unreadable_file",
            "the server answers 400, expected 200",
        )


class TestBuckets:
    @pytest.fixture
    def place(self, s3, files) -> str:
        for number, contents in enumerate(files.values()):
            put(s3, **{f"ct/{number}/{k}": content for k, content in enumerate(contents)})
        return f"s3://{NAME}/ct/"

    def test_a_broken_object_and_a_refused_one_are_named_and_the_rest_is_embedded(self, queue, place, s3, files):
        put(s3, **{"ct/0/1": files[ONE][1][:900], "ct/notes.txt": b"notes"})
        deny(s3, "ct/2/0")
        export_id = start(queue, place)

        assert run(queue, export_id) == ("done", None)

        found = series(queue, export_id)
        assert found[AGAIN.series_uid] == ("embedded", SLICES, {})
        assert found[ONE.series_uid][:2] == ("embedded", SLICES - 1)
        assert sum(found[ONE.series_uid][2].values()) == 1
        assert found[TWO.series_uid] == ("embedded", SLICES - 1, {})
        aside = queue.worker.stores.contents.files_aside(export_id, series_uid=None, after=None, limit=9)
        assert {(each.name, each.reason) for each in aside} >= {
            (b"2/0", "unreadable_file"),
            (b"notes.txt", "not_dicom"),
        }
        assert received(queue, AGAIN) == set(files[AGAIN])

    def test_killed_it_goes_on_where_it_was(self, queue, place):
        export_id = start(queue, place)
        queue.dies_at = 1
        with pytest.raises(Killed):
            run(queue, export_id)
        time.sleep(STALE_SECONDS)  # until its worker counts as dead

        assert run(queue, export_id) == ("done", None)

        assert Counter(queue.embedded) == dict.fromkeys([ONE.series_uid, AGAIN.series_uid, TWO.series_uid], 1)

    @pytest.mark.parametrize(
        ("known", "error"),
        [
            (True, "the bucket's server answers AccessDenied: these credentials may not read this"),
            (False, "the bucket's server answers InvalidAccessKeyId, expected credentials that it knows"),
        ],
    )
    def test_a_bucket_that_is_refused_fails_the_export(self, queue, s3, monkeypatch, known, error):
        with guarded(known=known) as credentials:
            for name, value in credentials.items():
                monkeypatch.setenv(name, value)

            assert run(queue, start(queue, f"s3://{NAME}/")) == ("failed", error)

    def test_a_bucket_that_is_missing_fails_the_export(self, queue, s3):
        error = "the bucket's server answers NoSuchBucket: it has no such thing"

        assert run(queue, start(queue, "s3://another/")) == ("failed", error)

    def test_a_bucket_that_is_away_is_tried_again_and_then_given_up(self, queue, s3, monkeypatch):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        export_id, error = start(queue, f"s3://{NAME}/"), "the bucket's server does not answer: EndpointConnectionError"

        ends = [run(queue, export_id) for _ in range(queue.worker.settings.max_attempts + 1)]

        assert ends == [("received", error)] * 3 + [("failed", f"given up after 3 attempts: {error}")]


class TestWhatMayBeAsked:
    @pytest.mark.parametrize(
        ("uri", "roots", "expected"),
        [
            ("s3://exports/2024", "/data,s3://exports", "s3://exports/2024/"),
            ("dicomweb+https://PACS/rs/", "dicomweb+https://pacs", "dicomweb+https://pacs/rs"),
        ],
    )
    def test_an_address_below_a_root(self, uri, roots, expected):
        assert checked_uri(uri, roots) == expected

    @pytest.mark.parametrize("roots", ["", "/", "s3://exports-2", "dicomweb+https://pacs"])
    def test_no_other(self, roots):
        with pytest.raises(PathNotAllowed):
            checked_uri("s3://exports", roots)

    def test_queries_go_with_servers_and_with_nothing_else(self):
        query = PacsQuery(patient_id="p")

        assert asked_of("s3://exports/", None, None) == asked_of("file:///x", None, None) == {}
        assert asked_of("dicomweb+https://pacs", query, None) == {"queries": [{"patient_id": "p"}], "bad_rows": []}
        for uri, *asked in (
            ("s3://exports/", query, None),
            ("file:///x", None, "patient_id\np\n"),
            ("dicomweb+https://pacs", None, None),
            ("dicomweb+https://pacs", query, "patient_id\np\n"),
        ):
            with pytest.raises(BadExport):
                asked_of(uri, *asked)
        with pytest.raises(BadQuery) as raised:
            asked_of("dicomweb+https://pacs", None, "date_from\nyesterday\n")
        assert [each["line"] for each in raised.value.found["bad_rows"]] == [2]
