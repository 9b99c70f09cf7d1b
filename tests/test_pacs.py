"""The DICOMweb pull: from our own service as the PACS, and from servers that do not behave."""

import json
import logging
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler

import pytest
from posting import post, slice_files
from pydantic import ValidationError
from web_answers import Answers, answer

from models.ct.phantom import Identity
from service.embedded import Running
from service.errors import BadQuery, CredentialsRefused, SourceAway, SourceFailed, SourceNotFound, SourceRefused
from service.pulls import parse_queries
from service.remotes import DicomWeb
from service.schemas.pulls import BadRow, PacsQuery
from service.settings import Settings
from workers import pacs as pacs_module
from workers.one_server import Patience
from workers.pacs import Instance, Pacs, open_pacs

QUICK = Patience(attempts=3, first=0.001, longest=0.002)
INSTANCE = Instance("1.2", "1.2.3", "1.2.3.4")


@pytest.fixture(scope="module")
def own(service: Running) -> Iterator[Pacs]:
    """Our own service as a PACS."""
    opened = open_pacs(DicomWeb(f"{service.address}/dicom-web"), Settings(), QUICK)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def stored(http) -> dict[str, dict[str, bytes]]:
    """Three series of two patients by UID, with the bytes of their files."""
    series = {}
    for seed, identity in enumerate(
        (Identity("pull one"), Identity("pull one", study="2"), Identity("pull two", series="2"))
    ):
        files = slice_files(identity, count=4, seed=seed)
        assert post(http, files).status_code == 202
        series[identity.series_uid] = dict(files)
    return series


def pacs_at(it: Answers, **settings: object) -> Pacs:
    return open_pacs(DicomWeb(it.url), Settings(**settings), QUICK)


def listed(*uids: str, tag: str = "0020000D"):
    return answer(200, json.dumps([{tag: {"vr": "UI", "Value": [uid]}} for uid in uids]).encode())


def related(*contents: bytes, end: bytes = b"--edge--"):
    parts = b"".join(b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + each + b"\r\n" for each in contents)
    return answer(200, b"\r\n" + parts + end, 'multipart/related; type="application/dicom"; boundary="edge"')


def broken_off(handler: BaseHTTPRequestHandler) -> None:
    """Says more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Type", 'multipart/related; type="application/dicom"; boundary=edge')
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + b"x" * 5000)
    handler.close_connection = True


class TestOurOwnServiceAsThePacs:
    def test_series_are_found_by_patient_study_date_and_modality(self, own, stored):
        one, again, two = stored
        study = Identity("pull one", study="2").study_uid

        found = {
            query: {each.series_uid for each in own.search(query)}
            for query in (
                PacsQuery(patient_id="pull one"),
                PacsQuery(patient_id="pull*"),
                PacsQuery(study_uid=study),
                PacsQuery(patient_id="pull two", date_from="20200101", date_to="20200101"),
                PacsQuery(patient_id="pull two", date_from="20200102"),
                PacsQuery(patient_id="pull two", modality="MR"),
                PacsQuery(patient_id="nobody & nothing=#?"),
            )
        }

        assert list(found.values()) == [{one, again}, {one, again, two}, {again}, {two}, set(), set(), set()]

    def test_pages_are_asked_for_until_there_are_no_more(self, own, stored, monkeypatch):
        monkeypatch.setattr(pacs_module, "PAGE", 3)

        found = list(own.search(PacsQuery(patient_id="pull*")))

        assert Counter(each.series_uid for each in found) == dict.fromkeys(stored, 4)
        assert len(set(found)) == 12

    def test_files_come_byte_for_byte(self, own, stored, tmp_path):
        came: dict[str, set[bytes]] = defaultdict(set)
        for number, each in enumerate(own.search(PacsQuery(patient_id="pull*"))):
            own.fetch(each, tmp_path / str(number))
            came[each.series_uid].add((tmp_path / str(number)).read_bytes())

        assert came == {uid: set(files.values()) for uid, files in stored.items()}
        assert len(list(tmp_path.iterdir())) == 12

    def test_an_instance_that_is_gone_is_named(self, own, stored, tmp_path):
        there = next(own.search(PacsQuery(patient_id="pull two")))

        with pytest.raises(SourceNotFound, match="404"):
            own.fetch(replace(there, sop_uid="1.2.3.4.5"), tmp_path / "file")

        assert list(tmp_path.iterdir()) == []


class TestServersThatDoNotBehave:
    def test_what_may_pass_is_tried_again(self, tmp_path):
        with Answers(answer(503, Retry_After="0"), broken_off, related(b"one", end=b""), related(b"whole")) as it:
            pacs = open_pacs(DicomWeb(it.url), Settings(), Patience(4, 0.001, 0.002))

            pacs.fetch(INSTANCE, tmp_path / "file")

        assert (tmp_path / "file").read_bytes() == b"whole"
        assert list(tmp_path.iterdir()) == [tmp_path / "file"]
        assert [path for path, _ in it.requests] == ["/dicom-web/studies/1.2/series/1.2.3/instances/1.2.3.4"] * 4

    def test_retry_after_is_waited_for(self, monkeypatch):
        waited = []
        monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
        with Answers(answer(429, Retry_After="7"), answer(503, Retry_After="soon"), answer(204)) as it:
            pacs = open_pacs(DicomWeb(it.url), Settings(), Patience(3, 0.5, 60))

            assert list(pacs.search(PacsQuery(patient_id="p"))) == []

        assert waited[0] == 7.0
        assert 1.0 <= waited[1] <= 1.5

    @pytest.mark.parametrize(
        ("status", "error", "requests"),
        [
            (401, CredentialsRefused, 1),
            (403, SourceRefused, 1),
            (404, SourceNotFound, 1),
            (400, SourceFailed, 1),
            (503, SourceAway, 3),
        ],
    )
    def test_a_refusal_is_named_without_the_query(self, status, error, requests, caplog):
        caplog.set_level(logging.DEBUG)
        with Answers(answer(status, b"no Jane^Doe", Warning="299 x: Jane^Doe")) as it, pytest.raises(error) as raised:
            list(pacs_at(it).search(PacsQuery(patient_id="Jane^Doe")))

        assert type(raised.value) is error
        assert str(status) in str(raised.value)
        assert len(it.requests) == requests
        assert "Jane" in it.requests[0][0]
        assert "Jane" not in f"{raised.value!r} {raised.value.__cause__!r} {caplog.text}"
        assert raised.value.__suppress_context__

    def test_nobody_who_listens_is_named(self, caplog):
        caplog.set_level(logging.DEBUG)
        with Answers(answer(204)) as it:
            pacs = pacs_at(it)

        with pytest.raises(SourceAway, match="ConnectionError, 3 times") as raised:
            list(pacs.search(PacsQuery(patient_id="Jane^Doe")))

        assert "Jane" not in f"{raised.value} {caplog.text}"

    def test_silence_is_given_up(self):
        ready = threading.Event()
        with Answers(lambda _: ready.wait(10)) as it:
            pacs = open_pacs(DicomWeb(it.url), Settings(fetch_silent_seconds=0.05), Patience(2, 0.001, 0.002))

            with pytest.raises(SourceAway, match="Timeout"):
                list(pacs.search(PacsQuery(patient_id="p")))
            ready.set()

        assert len(it.requests) == 2

    @pytest.mark.parametrize(
        "body",
        [b"<html>log in</html>", b'[{"0020000D": {"vr": "UI"}}]', b'[{"0020000D": {"Value": ["../1"]}}]', b"[1]"],
    )
    def test_an_answer_that_is_no_list_of_studies_is_refused(self, body):
        with Answers(answer(200, body)) as it, pytest.raises(SourceFailed) as raised:
            list(pacs_at(it).search(PacsQuery(patient_id="p")))

        assert type(raised.value) is SourceFailed
        assert len(it.requests) == 1

    def test_a_server_that_knows_no_offset_does_not_answer_for_ever(self):
        study, series, instance = (listed("1.2", tag=tag) for tag in ("0020000D", "0020000E", "00080018"))
        with Answers(study, series, instance, instance) as it, pytest.raises(SourceFailed, match="offset"):
            list(pacs_at(it).search(PacsQuery(patient_id="p")))

        assert len(it.requests) == 4

    @pytest.mark.parametrize("kind", ["text/html", "multipart/related"])
    def test_another_media_type_is_refused(self, kind, tmp_path):
        with Answers(answer(200, b"log in", kind)) as it, pytest.raises(SourceFailed, match="multipart/related"):
            pacs_at(it).fetch(INSTANCE, tmp_path / "file")

        assert len(it.requests) == 1

    def test_a_single_instance_without_multipart_is_taken(self, tmp_path):
        with Answers(answer(200, b"one", "application/dicom")) as it:
            pacs_at(it).fetch(INSTANCE, tmp_path / "file")

        assert (tmp_path / "file").read_bytes() == b"one"

    def test_more_than_the_instance_is_refused_at_once(self, tmp_path):
        with Answers(related(b"1", b"2")) as it, pytest.raises(SourceFailed, match="more than 1 files"):
            pacs_at(it).fetch(INSTANCE, tmp_path / "file")

        assert len(it.requests) == 1

    def test_a_full_disk_is_no_fault_of_the_server(self, tmp_path):
        (tmp_path / "file").touch()
        with Answers(related(b"1")) as it, pytest.raises(OSError, match="file"):
            pacs_at(it).fetch(INSTANCE, tmp_path / "file" / "instance")


class TestCredentials:
    @pytest.mark.parametrize(
        ("credentials", "expected"),
        [
            ({"dicomweb_token": "secret"}, "Bearer secret"),
            ({"dicomweb_user": "me", "dicomweb_password": "secret"}, "Basic bWU6c2VjcmV0"),
        ],
    )
    def test_they_go_to_the_server_they_are_of(self, credentials, expected):
        with Answers(answer(204)) as it, Answers(answer(204)) as other:
            for server in (it, other):
                list(pacs_at(server, dicomweb_server=it.url, **credentials).search(PacsQuery(patient_id="p")))

        assert [headers.get("Authorization") for _, headers in it.requests] == [expected]
        assert [headers.get("Authorization") for _, headers in other.requests] == [None]

    def test_no_redirect_leads_to_another_server(self, tmp_path):
        with Answers(answer(204)) as other:
            elsewhere = other.url.replace("127.0.0.1", "localhost")
            for target in (other.url, elsewhere):
                with Answers(answer(307, Location=f"{target}/studies")) as it:
                    pacs = pacs_at(it, dicomweb_server=it.url, dicomweb_token="secret")

                    with pytest.raises(SourceFailed, match="redirects to another"):
                        list(pacs.search(PacsQuery(patient_id="p")))
                    with pytest.raises(SourceFailed, match="redirects to another"):
                        pacs.fetch(INSTANCE, tmp_path / "file")

        assert other.requests == []

    def test_a_redirect_within_the_server_is_followed(self):
        with Answers(answer(307, Location="/dicom-web/moved"), answer(204)) as it:
            pacs = pacs_at(it, dicomweb_server=it.url, dicomweb_token="secret")

            assert list(pacs.search(PacsQuery(patient_id="p"))) == []

        assert [headers["Authorization"] for _, headers in it.requests] == ["Bearer secret"] * 2

    def test_the_environment_brings_none(self, tmp_path, monkeypatch):
        (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
        with Answers(answer(204)) as it:
            list(pacs_at(it).search(PacsQuery(patient_id="p")))

        assert "Authorization" not in it.requests[0][1]

    def test_they_do_not_stand_without_their_server(self):
        for credentials in ({"dicomweb_token": "secret"}, {"dicomweb_server": "https://pacs", "dicomweb_user": "me"}):
            with pytest.raises(ValidationError):
                Settings(**credentials)
        assert "secret" not in repr(Settings(dicomweb_server="https://pacs", dicomweb_token="secret"))


class TestTableOfQueries:
    def test_rows_are_queries_and_bad_ones_are_named_by_their_line(self):
        table = (
            "﻿patient_id,study_uid,date_from,modality\n"
            "Jane,,,\n"
            "\n"
            ",1.2.x,,\n"
            ",,20200101,MR\n"
            ",,,CT\n"
            "Joe,,2020-01-01,\n"
            "Joe\n"
            '"Doe, Jim",1.2.3,,\n'
        )

        found = parse_queries(table.encode())

        assert found.queries == [
            PacsQuery(patient_id="Jane"),
            PacsQuery(date_from="20200101", modality="MR"),
            PacsQuery(patient_id="Doe, Jim", study_uid="1.2.3"),
        ]
        assert found.bad == [
            BadRow(line=4, detail="study_uid is not a UID of at most 64 digits and dots"),
            BadRow(
                line=6,
                detail="expected a patient_id, study_uid, accession_number, date_from or date_to",
            ),
            BadRow(line=7, detail="date_from: String should match pattern '^(\\d{8})?$'"),
            BadRow(line=8, detail="1 cells, expected 4"),
        ]

    @pytest.mark.parametrize(
        "table",
        [b"", b"patient\nJane\n", b"patient_id,patient_id\nJane,Joe\n", b"patient_id\n", b"\xff", b'patient_id\n"x'],
    )
    def test_a_table_that_is_none_is_refused(self, table):
        with pytest.raises(BadQuery, match="table"):
            parse_queries(table)
