"""The list of jobs, and what failed tried again."""

from datetime import timedelta

import pytest
from posting import post, slice_files
from sqlalchemy import text, update
from starlette.testclient import TestClient
from test_catalog import archive

from models.ct.phantom import Identity
from service.app import create_app
from service.errors import BadQuery, JobNotFound, NotFailed, SeriesNotFound
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.jobs import _unfinished
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores, open_stores
from service.storage.tables import JobRow, now

ENCODER = "toy@0"


def upload(stores: Stores, *series_uids: str) -> str:
    for uid in series_uids:
        archive(stores, uid, "1", "2")
    return stores.catalog.receive([Arrival(uid, study_uid="1.2", patient_id="P1") for uid in series_uids], ENCODER)


def fail(stores: Stores, series_uid: str) -> None:
    stores.catalog.fail(EmbeddingKey(series_uid, ENCODER), "failed", "the decoder gave up")


def listed(stores: Stores, **asked) -> list[str]:
    asked = {"kind": None, "unfinished": False, "after": None, "limit": 100} | asked
    return [each.job.job_id for each in stores.jobs.list(**asked)]


@pytest.fixture
def own(tmp_path):
    """Stores on SQLite, for what concerns no database."""
    opened = open_stores(Settings(data_dir=tmp_path / "data", broker_url="memory://"))
    yield opened
    opened.close()


@pytest.fixture
def three(stores) -> list[str]:
    """An upload of two series, a training and an export, as old as their order says."""
    trained, _ = stores.heads.add(ENCODER, ["mass"], {}, {}, "lungs")
    exported, _ = stores.exports.add("file:///pacs", ENCODER, {"dry_run": False})
    return [upload(stores, "1.2.1", "1.2.2"), trained, exported.job_id]


def test_the_newest_comes_first_page_by_page(stores, three):
    moment = now()
    for age, job_id in enumerate(three):
        with stores.database.write() as session:
            at = moment - timedelta(seconds=age)
            session.execute(update(JobRow).where(JobRow.job_id == job_id).values(created_at=at))

    assert listed(stores) == three
    assert listed(stores, limit=2) == three[:2]
    assert listed(stores, after=three[1]) == three[2:]
    assert [listed(stores, kind=kind) for kind in ("embed", "train", "export")] == [[each] for each in three]


def test_jobs_of_one_moment_are_each_on_one_page(stores, three):
    with stores.database.write() as session:
        session.execute(update(JobRow).values(created_at=now()))

    one_by_one = [listed(stores, limit=1)]
    while found := listed(stores, limit=1, after=one_by_one[-1][0]):
        one_by_one.append(found)

    assert [each for (each,) in one_by_one] == sorted(three, reverse=True)


def test_a_job_is_unfinished_until_all_it_is_about_has_ended(stores, three):
    uploaded, trained, exported = three
    assert set(listed(stores, unfinished=True)) == set(three)

    stores.catalog.cancel(exported)
    stores.heads.fail(stores.jobs.get(trained).job.head_id, "no labels")
    fail(stores, "1.2.1")
    assert listed(stores, unfinished=True) == [uploaded]
    fail(stores, "1.2.2")

    assert listed(stores, unfinished=True) == []
    assert set(listed(stores)) == set(three)


def test_an_upload_is_told_by_the_sums_of_its_series(stores, three):
    stores.catalog.claim(EmbeddingKey("1.2.1", ENCODER), "me", 15, 3)
    stores.catalog.progress(EmbeddingKey("1.2.1", ENCODER), done=3, known=5)
    fail(stores, "1.2.2")

    found = stores.jobs.get(three[0])

    assert found.states == {"embedding": 1, "failed": 1}
    assert (found.done, found.known) == (3, 5 + 2)
    assert found.touched_at == max(row.touched_at for row, _ in stores.jobs.series(three[0]))
    assert [(row.series_uid, received) for row, received in stores.jobs.series(three[0])] == [
        ("1.2.1", 2),
        ("1.2.2", 2),
    ]


def test_the_list_reads_neither_all_jobs_nor_all_series(own):
    """SQLite's own account of how it would answer: an index for each of the tables, and no walk through one."""
    with own.database.read() as session:
        open_ones = _unfinished().compile(session.get_bind(), compile_kwargs={"literal_binds": True})
        newest = "SELECT job_id FROM jobs ORDER BY created_at DESC, job_id DESC LIMIT 5"
        plans = [session.execute(text(f"EXPLAIN QUERY PLAN {query}")).all() for query in (open_ones, newest)]
    told = [" ".join(step.detail for step in plan) for plan in plans]

    assert "SCAN" not in told[0], told[0]
    assert "ix_jobs_created_at" in told[1]
    assert "TEMP B-TREE" not in told[1]


def test_a_cursor_or_a_job_that_is_none_is_refused(stores):
    with pytest.raises(BadQuery):
        listed(stores, after="nothing")
    with pytest.raises(JobNotFound):
        stores.jobs.get("nothing")


def test_what_failed_is_taken_on_again_and_nothing_else(stores):
    job, key = upload(stores, "1.2.1"), EmbeddingKey("1.2.1", ENCODER)
    with pytest.raises(NotFailed, match="received, expected failed"):
        stores.catalog.retry("1.2.1")
    with pytest.raises(SeriesNotFound):
        stores.catalog.retry("1.2.9")
    fail(stores, "1.2.1")

    assert stores.catalog.retry("1.2.1") == key
    row = stores.catalog.series("1.2.1")
    assert (row.state, row.error, row.current.attempts) == ("received", None, 0)
    assert stores.catalog.waiting(job) == [key]
    assert stores.catalog.claim(key, "me", 15, 3)


class TestHttp:
    @pytest.fixture
    def settings(self, tmp_path):
        (tmp_path / "pacs").mkdir()
        return Settings(
            data_dir=tmp_path / "data", broker_url="memory://", sweep_seconds=1e6, export_roots=str(tmp_path / "pacs")
        )

    @pytest.fixture
    def http(self, settings):
        with TestClient(create_app(settings)) as client:
            yield client

    @pytest.fixture
    def beside(self, settings, http):
        """The stores of the service, opened once more: where a worker would write."""
        opened = open_stores(settings)
        yield opened
        opened.close()

    def test_each_kind_is_told_in_the_same_words(self, http, settings, beside):
        uploaded = post(http, slice_files(Identity("JOBS-1"), count=2)).json()
        exported = http.post("/v1/exports", json={"uri": str(settings.export_roots)}).json()
        trained, head_id = beside.heads.add(ENCODER, ["mass"], {}, {}, "lungs")
        beside.heads.fail(head_id, "one class only")

        page = http.get("/v1/jobs").json()
        jobs = {each["kind"]: each for each in page["jobs"]}

        assert page["next_cursor"] is None
        assert [each["job_id"] for each in page["jobs"]] == [trained, exported["job_id"], uploaded["job_id"]]
        assert {kind: each["state"] for kind, each in jobs.items()} == {
            "embed": "waiting",
            "train": "failed",
            "export": "waiting",
        }
        assert {kind: each["subject"] for kind, each in jobs.items()} == {
            "embed": f"/v1/jobs/{uploaded['job_id']}",
            "train": f"/v1/heads/{head_id}",
            "export": f"/v1/exports/{exported['export_id']}",
        }
        assert [jobs[kind]["name"] for kind in ("embed", "train", "export")] == [None, "lungs@1", exported["uri"]]
        assert (jobs["embed"]["states"], jobs["embed"]["known"]) == ({"queued": 1}, 2)
        assert jobs["train"]["error"] == "one class only"
        assert jobs["train"]["ended_at"] >= jobs["train"]["created_at"]
        assert (jobs["embed"]["ended_at"], jobs["export"]["ended_at"]) == (None, None)
        for each in jobs.values():
            alone = http.get(f"/v1/jobs/{each['job_id']}").json()
            assert {name: alone[name] for name in each} == each
            assert http.get(each["subject"]).status_code == 200

    def test_pages_and_what_is_no_page(self, http, beside):
        jobs = [upload(beside, f"1.2.{number}") for number in range(3)]

        first = http.get("/v1/jobs", params={"limit": 2}).json()
        rest = http.get("/v1/jobs", params={"limit": 2, "cursor": first["next_cursor"]}).json()

        assert [each["job_id"] for page in (first, rest) for each in page["jobs"]] == jobs[::-1]
        assert rest["next_cursor"] is None
        for wrong in ({"cursor": "none"}, {"kind": "other"}, {"limit": 0}, {"unfinished": "perhaps"}):
            assert http.get("/v1/jobs", params=wrong).status_code == 422, wrong

    def test_a_series_that_failed_is_queued_again_without_its_files(self, http, beside):
        sent = post(http, slice_files(Identity("JOBS-2"), count=2)).json()
        uid = sent["series"][0]["series_uid"]
        too_early = http.post(f"/v1/series/{uid}/retry")
        encoder_id = beside.catalog.series(uid).encoder_id
        beside.catalog.fail(EmbeddingKey(uid, encoder_id), "failed", "the decoder gave up")
        failed = http.get(f"/v1/jobs/{sent['job_id']}").json()

        again = http.post(f"/v1/series/{uid}/retry")

        assert (too_early.status_code, too_early.json()["type"]) == (409, "urn:keyslice:not-failed")
        assert (failed["state"], failed["states"], failed["series"][0]["error"]) == (
            "failed",
            {"failed": 1},
            "the decoder gave up",
        )
        assert (again.status_code, again.json()["state"], again.json()["error"]) == (202, "queued", None)
        assert http.get(f"/v1/jobs/{sent['job_id']}").json()["state"] == "waiting"
        assert http.post("/v1/series/1.2.3/retry").status_code == 404

    def test_an_export_is_asked_for_again_by_its_id(self, http, settings, beside):
        first = http.post("/v1/exports", json={"uri": str(settings.export_roots), "dry_run": True}).json()
        going = http.post(f"/v1/exports/{first['export_id']}/retry").json()
        http.post(f"/v1/jobs/{first['job_id']}/cancel")

        anew = http.post(f"/v1/exports/{first['export_id']}/retry")

        assert (going["export_id"], going["resumed"]) == (first["export_id"], True)
        assert (anew.status_code, anew.json()["resumed"]) == (202, False)
        assert anew.json()["export_id"] != first["export_id"]
        assert beside.exports.get(anew.json()["export_id"]).options == {"dry_run": True}
        assert http.post("/v1/exports/none/retry").status_code == 404

    def test_an_export_is_not_read_again_where_its_root_is_none_any_more(self, http, settings, beside):
        elsewhere, _ = beside.exports.add("file:///elsewhere", ENCODER, {"dry_run": False})
        erased, _ = beside.exports.add("erased:", ENCODER, {"dry_run": False})

        assert http.post(f"/v1/exports/{elsewhere.export_id}/retry").status_code == 403
        assert http.post(f"/v1/exports/{erased.export_id}/retry").status_code == 422

    def test_the_series_of_an_export_in_one_state(self, http, beside):
        row, _ = beside.exports.add("file:///pacs", ENCODER, {"dry_run": False})
        insert = "INSERT INTO export_series (export_id, series_uid, state, files) VALUES (:export, :uid, :state, 1)"
        with beside.database.write() as session:
            for number, state in enumerate(("embedded", "failed", "rejected", "failed")):
                values = {"export": row.export_id, "uid": f"1.2.{number}", "state": state}
                session.execute(text(insert), values)

        found = http.get(f"/v1/exports/{row.export_id}", params={"state": "failed"}).json()

        assert [each["series_uid"] for each in found["series"]] == ["1.2.1", "1.2.3"]
        assert found["states"] == {"embedded": 1, "failed": 2, "rejected": 1}
        assert http.get(f"/v1/jobs/{row.job_id}").json()["states"] == found["states"]
