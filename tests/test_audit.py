"""The audit: one chain of whoever read or wrote whose data, which tells when it was changed, and names nobody."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from posting import post, slice_files
from searching import Made, embed_made, random_bag
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service.app import create_app
from service.cli import app as command
from service.recorder import Recorder
from service.settings import Settings
from service.storage.audit import Audit
from service.storage.chain import FIRST, MOST_SERIES, Chain, Event, canonical, digest_of
from service.storage.database import Database
from service.storage.stores import Stores, open_stores
from service.storage.tables import AuditRow, now

SECRET = b"a key of sixteen bytes or more"
READ = Event("key:one", "image.read", status=200, series_uids=("1.2.3",))


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Stores]:
    """Stores on SQLite, for what concerns no database."""
    opened = open_stores(Settings(data_dir=tmp_path / "data"))
    yield opened
    opened.close()


def entries(stores: Stores, **filters) -> list[dict[str, Any]]:
    return [json.loads(row.entry) for row in stores.audit.list(**filters)]


def told(stores: Stores, **filters) -> list[tuple]:
    return [(each["who"], each["kind"], each["outcome"], each.get("status")) for each in entries(stores, **filters)]


def changed(stores: Stores, sql: str) -> None:
    with stores.database.write() as session:
        session.connection().exec_driver_sql(sql)


# The chain


def test_entries_follow_each_other_by_digest_and_name_series_by_opaque_keys(stores):
    embed_made(stores, Made("1.2.3", random_bag(0, slices=1), patient="SECRET-ID"))
    series = stores.catalog.series("1.2.3")

    stores.audit.append([READ, replace(READ, series_uids=("9.9",), outcome="refused", status=404)])
    stores.audit.append(
        [Event("local", "predictions.read", patient_ids=("SECRET-ID", "no\0body"), about=(("head", "h"),))]
    )
    stores.audit.append([Event("local", "dicomweb.files", study_uids=(series.study_uid,), times=3)])

    first, second, third, fourth = stores.audit.list()
    assert json.loads(first.entry) == {
        "at": first.at.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "seq": 1,
        "prev": FIRST,
        "who": "key:one",
        "kind": "image.read",
        "outcome": "done",
        "status": 200,
        "series": [series.series_key],
        "patients": [series.patient_key],
    }
    assert first.digest == digest_of(first.entry) and first.entry == canonical(json.loads(first.entry))
    assert [json.loads(row.entry)["prev"] for row in (second, third)] == [first.digest, second.digest]
    assert json.loads(second.entry).get("series") is None and json.loads(second.entry)["unknown"] == 1
    assert json.loads(third.entry)["patients"] == [series.patient_key] and json.loads(third.entry)["unknown"] == 1
    assert json.loads(fourth.entry)["series"] == [series.series_key] and json.loads(fourth.entry)["times"] == 3
    assert stores.audit.verify().head == f"4:{fourth.digest}"


def test_writers_of_several_processes_make_one_chain(stores):
    url = stores.database.engine.url.render_as_string(hide_password=False)
    own = [Audit(Database(url), Chain()) for _ in range(4)]
    threads = [
        threading.Thread(target=lambda audit=audit: [audit.append([READ, READ]) for _ in range(5)]) for audit in own
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    found = stores.audit.verify()

    assert (found.entries, found.wrong) == (40, None)


@pytest.mark.parametrize(
    ("sql", "wrong", "said"),
    [
        ("UPDATE audit SET entry = replace(entry, 'key:one', 'key:two') WHERE seq = 3", 3, "its text has the SHA-256"),
        ("DELETE FROM audit WHERE seq = 3", 4, "entry 3 is missing"),
        ("DELETE FROM audit WHERE seq = 1", 2, "entry 1 is missing"),
        ("UPDATE audit SET at = '2020-01-01 00:00:00.000000' WHERE seq = 3", 3, "its place or time"),
        ("UPDATE audit SET seq = 9 WHERE seq = 5", 9, "entry 5 is missing"),
    ],
)
def test_an_entry_that_was_changed_taken_out_or_moved_is_named(own, sql, wrong, said):
    own.audit.append([READ] * 5)
    assert own.audit.verify().wrong is None

    changed(own, sql)

    found = own.audit.verify()
    assert found.wrong == wrong and said in found.fault


def test_an_entry_written_anew_with_its_digest_breaks_the_next(own):
    own.audit.append([READ] * 3)
    row = next(own.audit.list())
    forged = row.entry.replace("key:one", "key:two")
    changed(own, f"UPDATE audit SET entry = '{forged}', digest = '{digest_of(forged)}' WHERE seq = 1")

    found = own.audit.verify()

    assert found.wrong == 2 and f"it follows {row.digest}" in found.fault


def test_a_chain_that_was_written_anew_from_the_start_has_no_signatures(own):
    """Whoever can write to the catalog can make a chain that fits, but not sign it."""
    signed = Audit(own.database, Chain(SECRET))
    own.audit.append([READ])  # before there was a key
    signed.append([READ] * 2)
    assert (signed.verify().entries, signed.verify().signed, signed.verify().wrong) == (3, 2, None)
    assert own.audit.verify().wrong is None  # anybody may check the digests

    assert Audit(own.database, Chain(b"another key of sixteen bytes")).verify().wrong == 2
    own.audit.append([READ])
    assert signed.verify().wrong == 4 and "not signed" in signed.verify().fault


def test_a_chain_that_is_cut_off_at_its_end_lacks_the_head_that_was_kept(own):
    own.audit.append([READ] * 3)
    head = own.audit.verify().head
    own.audit.append([READ])
    assert own.audit.verify(head).wrong is None

    changed(own, "DELETE FROM audit WHERE seq >= 3")

    assert own.audit.verify().wrong is None
    assert own.audit.verify(head).wrong == 3


def test_what_was_kept_long_enough_goes_and_the_rest_still_fits(stores):
    old, older = now() - timedelta(days=10), now() - timedelta(days=20)
    stores.audit.append([replace(READ, at=older), replace(READ, at=old), READ])
    assert stores.audit.trim(now() - timedelta(days=30)) == 0

    removed = [stores.audit.trim(now() - timedelta(days=days)) for days in (15, 15, 5, -1)]
    stores.audit.append([READ])

    found = stores.audit.verify()
    assert removed == [1, 0, 1, 3]  # the last takes the anchors of those before with it
    assert (found.entries, found.trimmed, found.wrong) == (2, 5, None)
    with stores.database.write() as session:
        session.execute(sqlalchemy.delete(AuditRow).where(AuditRow.seq == 6))
    assert stores.audit.verify().wrong == 7


def test_more_series_than_one_entry_names_are_several_entries(own):
    own.audit.append([Event("local", "train", series_keys=tuple(f"{k:032x}" for k in range(MOST_SERIES + 1)))])

    assert [len(each["series"]) for each in entries(own)] == [MOST_SERIES, 1]


# The recorder


def test_reads_of_a_moment_are_one_entry_with_their_number(own):
    recorder = Recorder(own.audit, gather_seconds=60)
    for _ in range(3):
        recorder.note([READ])
    recorder.note([replace(READ, who="key:two")])
    assert entries(own) == []

    recorder.append([Event("key:two", "upload", status=202)])

    assert [(each["who"], each["kind"], each.get("times", 1)) for each in entries(own)] == [
        ("key:one", "image.read", 3),
        ("key:two", "image.read", 1),
        ("key:two", "upload", 1),
    ]
    recorder.note([READ])
    recorder.close()
    assert len(entries(own)) == 4


def test_reads_are_on_record_after_a_moment_and_after_a_catalog_that_was_away(own, monkeypatch):
    away = threading.Event()
    append = own.audit.append

    def appending(events) -> None:
        if not away.is_set():
            away.set()
            raise OperationalError("", {}, Exception())
        append(events)

    monkeypatch.setattr(own.audit, "append", appending)
    monkeypatch.setattr("service.recorder.MOST_WAITING", 1)
    recorder = Recorder(own.audit, gather_seconds=0.01)
    recorder.append([READ, replace(READ, who="key:two")])
    assert away.wait(10)
    recorder.close()

    assert told(own) == [("key:one", "image.read", "done", 200), ("service", "audit.lost", "failed", None)]


# Through the API

HERE = Made("1.2.840.7", random_bag(1, slices=3), patient="QZX-AUDITED")
OTHER = Made("1.2.840.8", random_bag(2, slices=3), patient="QZX-OTHER")


@contextmanager
def serving(data_dir: Path, **others) -> Iterator[tuple[TestClient, Stores]]:
    settings = Settings(data_dir=data_dir, **{"broker_url": "memory://", "sweep_seconds": 3600, **others})
    stores = open_stores(settings)
    with TestClient(create_app(settings), client=("127.0.0.1", 1), base_url="http://127.0.0.1:8000") as client:
        yield client, stores
    stores.close()


def test_who_reads_and_writes_is_on_record_with_the_outcome(tmp_path):
    here, other = Identity("QZX-HERE"), Identity("QZX-OTHER")
    with opened(tmp_path) as stores:
        reader, read = stores.api_keys.create("reader", ["read"], None)
        writer, write = stores.api_keys.create("writer", ["write"], None)
    as_reader, as_writer = ({"Authorization": f"Bearer {token}"} for token in (read, write))
    with serving(tmp_path) as (client, stores):
        client.headers.update(as_writer)
        sent = [post(client, slice_files(each, count=2)).json() for each in (here, other)]
        key, others = (stores.catalog.series(each.series_uid).series_key for each in (here, other))

        def get(path: str) -> int:
            return client.get(path, headers=as_reader).status_code

        assert get(f"/v1/series/{here.series_uid}") == 200
        assert get(f"/v1/series/{here.series_uid}/slices/0/image") == 409
        assert get("/v1/series/1.9.9.QZX-NOBODY") == 404
        assert get("/v1/patients/QZX-NOBODY/predictions?head=QZX-NOHEAD") == 404
        assert get("/v1/series?limit=10") == get("/dicom-web/series") == get("/dicom-web/studies") == 200
        assert get(f"/dicom-web/studies/{here.study_uid}") == get("/v1/encoders") == 200
        assert get(f"/v1/jobs/{sent[0]['job_id']}") == 200
        tags = f"/v1/series/{here.series_uid}/tags"
        assert client.put(tags, json={"tags": ["x"]}, headers=as_reader).status_code == 403
        assert client.put(tags, json={"tags": ["x"]}).status_code == 200
        at_once = told(stores)[-1]
        assert client.request("QZX-NOBODY", f"/v1/series/{here.series_uid}", headers=as_reader).status_code == 405
    with opened(tmp_path) as stores:
        every, found = entries(stores), stores.audit.verify()
        of_other = [each["kind"] for each in entries(stores, names=[others])]
        mine = entries(stores, who=f"key:{reader.key_id}")
    content = b"".join(path.read_bytes() for path in tmp_path.glob("catalog.db*"))

    assert at_once == (f"key:{writer.key_id}", "tags.write", "done", 200)
    uploads = [(each["who"], each["series"], each["about"]) for each in every if each["kind"] == "upload"]
    assert uploads == [
        (f"key:{writer.key_id}", [each], {"job": job["job_id"]}) for each, job in zip((key, others), sent, strict=True)
    ]
    assert of_other == ["upload", "series.list", "dicomweb.search", "dicomweb.search"]
    both = tuple(sorted([key, others]))
    assert sorted((each["kind"], each["status"], tuple(sorted(each.get("series", [])))) for each in mine) == [
        ("dicomweb.files", 200, (key,)),
        ("dicomweb.search", 200, both),
        ("dicomweb.search", 200, both),
        ("image.read", 409, (key,)),
        ("predictions.read", 404, ()),
        ("series.list", 200, both),
        ("series.read", 200, (key,)),
        ("series.read", 404, ()),
        ("tags.write", 403, (key,)),
    ]
    assert {(each["status"], each["outcome"]) for each in mine} == {
        (200, "done"),
        (403, "denied"),
        (404, "refused"),
        (409, "refused"),
    }
    assert found.wrong is None
    assert b"QZX-NOBODY" not in content and b"QZX-NOHEAD" not in content


@contextmanager
def opened(data_dir: Path) -> Iterator[Stores]:
    stores = open_stores(Settings(data_dir=data_dir))
    yield stores
    stores.close()


def test_a_cohort_that_streams_out_is_noted_as_it_goes(tmp_path, monkeypatch):
    monkeypatch.setattr("service.audited.MOST_SERIES", 2)
    with serving(tmp_path, encoder="efficientnet_lite0") as (client, stores):
        encoder_id = Settings().own_encoder_id()
        dim = client.get("/v1/encoders").json()["encoders"]
        dim = next(each["dim"] for each in dim if each["default"])
        for k in range(3):
            embed_made(stores, Made(f"1.2.{k}", random_bag(k, slices=1, dim=dim), patient="MANY"), encoder_id)
        assert client.get("/v1/features?format=arrow").status_code == 200
    with opened(tmp_path) as stores:
        keys = {stores.catalog.series(f"1.2.{k}").series_key for k in range(3)}
        rows = [each for each in entries(stores) if each["kind"] == "features.read"]

    assert rows[0]["about"] == {"cohort": 3}
    assert {key for each in rows for key in each.get("series", [])} == keys


# Erasure


def test_after_an_erasure_the_audit_names_nobody_and_has_the_receipt(tmp_path):
    with opened(tmp_path) as stores:
        for made in (HERE, OTHER):
            embed_made(stores, made)
        series = stores.catalog.series(HERE.series_uid)
        stores.audit.append(
            [replace(READ, series_uids=(HERE.series_uid,)), Event("local", "x", patient_ids=(HERE.patient,))]
        )
        erasure_id = stores.erasures.begin(patient_id=HERE.patient, who="key:admin")
        stores.erasures.emptied(erasure_id)
        stores.database.scrub([HERE.series_uid, HERE.patient])
        stores.erasures.finish(erasure_id)
        stores.erasures.finish(erasure_id)
        rows, removed = entries(stores), stores.erasures.get(erasure_id).removed
        found = stores.audit.verify()
        content = b"".join(path.read_bytes() for path in tmp_path.glob("catalog.db*"))

    asked, receipt = rows[2:]
    assert (asked["who"], receipt["who"]) == ("key:admin", "service")
    assert (asked["series"], asked["patients"]) == ([series.series_key], [series.patient_key])
    assert receipt["about"]["removed"] == removed and receipt["about"]["erasure"] == asked["about"]["erasure"]
    assert found.wrong is None and found.entries == 4
    assert HERE.series_uid.encode() not in content and HERE.patient.encode() not in content


# The command


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command, ["audit", *arguments])


def test_the_command_lists_and_verifies(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("KEYSLICE_AUDIT_KEY", SECRET.decode())
    empty = run("verify")
    with opened(tmp_path) as stores:
        embed_made(stores, HERE)
        key = stores.catalog.series(HERE.series_uid).series_key
        patient = stores.catalog.series(HERE.series_uid).patient_key
        stores.audit.append([replace(READ, series_uids=(HERE.series_uid,), at=now() - timedelta(hours=2)), READ])
        made, _ = stores.api_keys.create("x", ["read"], None, "command:me")

    whole = run("verify", "--json")
    by_series = run("list", "--series", HERE.series_uid, "--json")
    by_patient = run("list", "--patient", patient, "--json")
    by_key = run("list", "--key", "one", "--since", "1h", "--json")
    shown = run("list", "--limit", "1")
    wrong = run("list", "--since", "yesterday")
    with opened(tmp_path) as stores:
        changed(stores, "UPDATE audit SET entry = replace(entry, 'key:one', 'key:two') WHERE seq = 2")
    broken = run("verify")

    assert (empty.exit_code, whole.exit_code, broken.exit_code, wrong.exit_code) == (0, 0, 3, 2)
    assert json.loads(whole.stdout)["entries"] == json.loads(whole.stdout)["signed"] == 3
    assert [json.loads(line)["series"] for line in by_series.stdout.splitlines()] == [[key]]
    assert by_patient.stdout == by_series.stdout
    assert [json.loads(line)["seq"] for line in by_key.stdout.splitlines()] == [2]
    assert made.key_id in shown.stdout and "key.create" in shown.stdout and "image.read" not in shown.stdout
    assert "entry 2 does not fit: its text has the SHA-256" in broken.stderr
