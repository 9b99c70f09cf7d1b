"""What callers do wrong: each a 4xx problem that says what was found, with nothing left behind."""

import io
import re
import socket
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import numpy as np
import pytest
from posting import embed, post, slice_files, tarred, wait
from pydicom.encaps import encapsulate
from pydicom.uid import MPEG2MPML

from models.ct.phantom import Identity
from service.embedded import Running


def problem(answer: httpx.Response, status: int, kind: str) -> dict:
    """The answer's body, when it is the RFC 9457 problem expected."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (body["type"], body["status"]) == (f"urn:keyslice:{kind}", status)
    assert body["title"] and body["detail"]
    return body


def zipped(files: list[tuple[str, bytes]]) -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return body.getvalue()


@pytest.fixture
def nothing_left_behind(http: httpx.Client, service: Running):
    """The series and staged files are the same afterwards."""
    root = Path(service_data(service))
    before = http.get("/v1/series?limit=1000").json()
    yield
    assert http.get("/v1/series?limit=1000").json() == before
    assert [path for path in (root / "staging").rglob("*") if path.is_file()] == []
    assert {path.name for path in (root / "archive").glob("*")} == {each["series_uid"] for each in before["series"]}


def service_data(service: Running) -> str:
    with Path(f"/proc/{service.process.pid}/environ").open("rb") as file:
        variables = dict(pair.split(b"=", 1) for pair in file.read().split(b"\0") if b"=" in pair)
    return variables[b"KEYSLICE_DATA_DIR"].decode()


@pytest.mark.usefixtures("nothing_left_behind")
class TestUploads:
    def test_no_parts(self, http):
        answer = http.post(
            "/v1/series", content=b"--x--\r\n", headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        problem(answer, 422, "empty-upload")

    def test_an_empty_file(self, http):
        problem(post(http, [("a.dcm", b"")]), 422, "empty-upload")

    def test_not_multipart(self, http):
        assert "multipart/form-data" in problem(http.post("/v1/series", json={}), 422, "bad-upload")["detail"]

    def test_a_body_that_ends_early(self, http):
        body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nabc'
        answer = http.post("/v1/series", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
        problem(answer, 422, "bad-upload")

    def test_a_malformed_body(self, http):
        answer = http.post(
            "/v1/series", content=b"garbage", headers={"Content-Type": "multipart/form-data; boundary=x"}
        )
        problem(answer, 422, "bad-upload")

    def test_a_part_of_another_name(self, http):
        answer = http.post("/v1/series", files={"file": b"abc"})
        assert "'file'" in problem(answer, 422, "bad-upload")["detail"]

    def test_text_named_dcm(self, http):
        found = problem(post(http, [("notes.dcm", b"hello " * 100)]), 422, "nothing-usable")["set_aside"]
        assert [(each["file"], each["reason"]) for each in found] == [("notes.dcm", "not_dicom")]

    def test_a_truncated_zip(self, http):
        body = zipped(slice_files(Identity("TRUNCATED-ZIP")))
        problem(post(http, [("series.zip", body[: len(body) // 2])]), 422, "bad-archive")

    def test_a_zip_with_a_damaged_member(self, http):
        body = bytearray(zipped(slice_files(Identity("DAMAGED-ZIP"))))
        body[len(body) // 3] ^= 0xFF
        problem(post(http, [("series.zip", bytes(body))]), 422, "bad-archive")

    @pytest.mark.parametrize("kind", ["gz", "xz", "bz2"])
    def test_a_truncated_compressed_tar(self, http, kind):
        body = tarred(slice_files(Identity("TRUNCATED-TAR")), f"w:{kind}")
        problem(post(http, [("series.tar", body[: len(body) // 2])]), 422, "bad-archive")

    @pytest.mark.parametrize(
        "name", ["../escape.dcm", "/etc/escape.dcm", "a/../../escape.dcm", "..\\escape.dcm", "C:\\x.dcm"]
    )
    def test_members_that_escape(self, http, name):
        content = slice_files(Identity("ESCAPE"), count=1)[0][1]
        problem(post(http, [("series.zip", zipped([(name, content)]))]), 422, "bad-archive")
        problem(post(http, [("series.tar", tarred([(name, content)]))]), 422, "bad-archive")

    @pytest.mark.parametrize(
        "kind",
        [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE],
        ids=["symbolic link", "hard link", "fifo", "character device", "block device"],
    )
    def test_a_tar_with_a_link_or_device(self, http, kind):
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode="w") as archive:
            member = tarfile.TarInfo("link.dcm")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        assert "link or device" in problem(post(http, [("series.tar", body.getvalue())]), 422, "bad-archive")["detail"]

    def test_a_zip_with_a_symbolic_link(self, http):
        body = io.BytesIO()
        with zipfile.ZipFile(body, "w") as archive:
            member = zipfile.ZipInfo("link.dcm")
            member.external_attr = (stat.S_IFLNK | 0o777) << 16
            archive.writestr(member, "/etc/passwd")
        assert "link" in problem(post(http, [("series.zip", body.getvalue())]), 422, "bad-archive")["detail"]

    @pytest.mark.parametrize("pack", [zipped, tarred])
    def test_an_archive_in_an_archive_is_not_opened(self, http, pack):
        inner = pack(slice_files(Identity("NESTED"), count=1))
        found = problem(post(http, [("outer", pack([("inner", inner)]))]), 422, "nothing-usable")["set_aside"]
        assert [(each["file"], each["reason"]) for each in found] == [("inner", "not_dicom")]

    @pytest.mark.parametrize(
        "pack",
        [zipped, *(partial(tarred, mode=f"w:{kind}") for kind in ("gz", "xz", "bz2"))],
        ids=["zip", "tar.gz", "tar.xz", "tar.bz2"],
    )
    def test_a_bomb(self, http, pack):
        bomb = pack([("zeros.dcm", bytes(300 * 2**20))])
        assert len(bomb) < 2**20
        assert "expands" in problem(post(http, [("bomb", bomb)]), 422, "bad-archive")["detail"]

    def test_a_slice_without_pixels(self, http):
        def strip(_number, dataset):
            del dataset.PixelData

        answer = post(http, slice_files(Identity("NO-PIXELS"), count=1, change=strip))
        assert problem(answer, 422, "nothing-usable")["set_aside"][0]["reason"] == "no_pixels"

    def test_only_other_modalities(self, http):
        def resonance(_number, dataset):
            dataset.Modality = "MR"

        answer = post(http, slice_files(Identity("MR"), count=2, change=resonance))
        assert [each["reason"] for each in problem(answer, 422, "nothing-usable")["set_aside"]] == ["not_ct", "not_ct"]

    def test_uids_that_are_paths(self, http):
        def path(_number, dataset):
            dataset.SeriesInstanceUID = "../../outside"

        answer = post(http, slice_files(Identity("PATH"), count=1, change=path))
        assert problem(answer, 422, "nothing-usable")["set_aside"][0]["reason"] == "invalid_uid"

    def test_an_encoder_that_is_not_there(self, http):
        problem(post(http, slice_files(Identity("ENCODER"), count=1), encoder="resnet"), 404, "encoder-not-found")

    def test_an_encoder_without_weights(self, http):
        answer = post(http, slice_files(Identity("ENCODER"), count=1), encoder="mambaout_tiny")
        assert "keyslice fetch" in problem(answer, 409, "weights-not-here")["detail"]


def test_an_undecodable_slice_is_named_and_the_rest_goes_on(http):
    def spoil(number, dataset):
        if number == 2:
            dataset.PixelData = dataset.PixelData[:100]

    embed(http, slice_files(Identity("SPOILED"), count=6, change=spoil))

    series = http.get(f"/v1/series/{Identity('SPOILED').series_uid}").json()
    bag = http.get(f"/v1/series/{series['series_uid']}/embeddings").json()
    assert [each["z_mm"] for each in bag["slices"]] == [0.0, 5.0, 15.0, 20.0, 25.0]
    assert series["verdict"]["status"] == "accepted_with_warnings"
    assert [each["reason"] for each in series["verdict"]["set_aside"]] == ["undecodable"]
    assert {each["code"] for each in series["verdict"]["findings"]} == {"slices_set_aside", "missing_slices"}


def test_an_empty_file_among_others_is_named(http):
    files = [*slice_files(Identity("BESIDE-EMPTY"), count=2), ("nothing.dcm", b"")]

    answer = post(http, files).json()

    (aside,) = answer["set_aside"]
    assert (aside["file"], aside["reason"]) == ("nothing.dcm", "not_dicom")
    assert answer["series"][0]["received"] == 2


def test_names_that_are_not_ascii_come_back_as_they_were(http):
    names = {"ISO_IR 100": "Äöü-Ñ", "ISO_IR 144": "Иванов", "GB18030": "王小东", "ISO 2022 IR 87": "山田"}
    for character_set, patient_id in names.items():

        def change(_, dataset, character_set=character_set, patient_id=patient_id):
            dataset.SpecificCharacterSet = ["", character_set] if "2022" in character_set else character_set
            dataset.PatientID, dataset.PatientName = patient_id, f"{patient_id}^{patient_id}"

        embed(http, slice_files(Identity(patient_id), count=2, change=change))

        (series,) = http.get("/v1/series", params={"patient_id": patient_id}).json()["series"]
        assert (series["patient_id"], series["state"]) == (patient_id, "indexed")


def test_an_unsupported_syntax_is_named_at_once(http):
    def unsupported(number, dataset):
        if number == 2:
            dataset.file_meta.TransferSyntaxUID = MPEG2MPML
            dataset.PixelData = encapsulate([dataset.PixelData])
            dataset["PixelData"].is_undefined_length = True

    answer = embed(http, slice_files(Identity("MPEG"), count=6, change=unsupported))

    (series,) = answer["series"]
    assert [(each["file"], each["reason"]) for each in series["set_aside"]] == [
        ("2.dcm", "unsupported_transfer_syntax")
    ]
    assert series["received"] == 5


def test_a_series_of_which_nothing_decodes_is_rejected_with_its_reason(http):
    def spoil(_number, dataset):
        dataset.PixelData = dataset.PixelData[:100]

    answer = post(http, slice_files(Identity("REJECTED"), count=2, change=spoil)).json()
    wait(http, answer["job_id"])

    series = http.get(f"/v1/series/{Identity('REJECTED').series_uid}").json()
    assert (series["state"], series["verdict"]["status"]) == ("rejected", "rejected")
    answer = http.get(f"/v1/series/{series['series_uid']}/embeddings")
    assert problem(answer, 409, "not-embedded-yet")["state"] == "rejected"


def test_a_series_uid_of_another_patient_is_not_mixed_in(http):
    embed(http, slice_files(Identity("OWNER"), count=2))

    def steal(number, dataset):
        dataset.SeriesInstanceUID = Identity("OWNER").series_uid
        dataset.SOPInstanceUID = Identity("OWNER").uid("stolen", str(number))

    answer = post(http, slice_files(Identity("THIEF"), count=2, change=steal))

    reasons = [each["reason"] for each in problem(answer, 422, "nothing-usable")["set_aside"]]
    assert reasons == ["series_of_another_patient"] * 2
    assert http.get(f"/v1/series/{Identity('OWNER').series_uid}").json()["received"] == 2


class TestUnknownThings:
    @pytest.mark.parametrize("uid", ["1.2.3", "..", "%2e%2e%2f", "%00", "%ff", "x" * 300, "a'b"])
    def test_series(self, http, uid):
        answer = http.get(f"/v1/series/{uid}")
        assert 400 <= answer.status_code < 500

    def test_series_by_name(self, http):
        problem(http.get("/v1/series/1.2.3"), 404, "series-not-found")
        problem(http.get("/v1/series/1.2.3/embeddings"), 404, "series-not-found")
        problem(http.get("/v1/series/1.2.3/slices/0/image"), 404, "series-not-found")

    def test_patient(self, http, trained):
        answer = http.get("/v1/patients/NOBODY-7/predictions", params={"head": trained})
        assert "NOBODY-7" not in problem(answer, 404, "patient-not-found")["detail"]

    def test_head(self, http):
        problem(http.get("/v1/heads/none"), 404, "head-not-found")
        problem(http.get("/v1/patients/P/predictions?head=none"), 404, "head-not-found")
        problem(http.get("/v1/series/1.2.3/attention?head=none"), 404, "head-not-found")

    def test_job(self, http):
        problem(http.get("/v1/jobs/none"), 404, "job-not-found")
        problem(http.get("/v1/jobs/none/events"), 404, "job-not-found")

    def test_window(self, http, small):
        problem(http.get(f"/v1/series/{small}/slices/0/image?window=brain"), 404, "window-not-found")
        problem(http.get(f"/v1/series/{small}/embeddings?window=brain"), 404, "window-not-found")

    def test_slice(self, http, small):
        problem(http.get(f"/v1/series/{small}/slices/99/image"), 404, "slice-not-found")
        problem(http.get(f"/v1/series/{small}/slices/-1/image"), 404, "slice-not-found")

    def test_encoder(self, http, small):
        problem(http.get(f"/v1/series/{small}/embeddings?encoder=x"), 404, "encoder-not-found")
        problem(http.get(f"/v1/series/{small}/embeddings?encoder=efficientnet_lite0@0"), 409, "other-encoder")

    def test_path_and_method(self, http):
        problem(http.get("/v1/nothing"), 404, "not-found")
        problem(http.delete("/v1/series"), 405, "method-not-allowed")


@pytest.fixture(scope="module")
def small(http: httpx.Client) -> str:
    embed(http, slice_files(Identity("SMALL"), count=2))
    return Identity("SMALL").series_uid


@pytest.fixture(scope="module")
def four(http: httpx.Client) -> list[str]:
    for number in range(4):
        embed(http, slice_files(Identity(f"FOUR-{number}"), count=2, seed=number))
    return [f"FOUR-{number}" for number in range(4)]


@pytest.fixture(scope="module")
def trained(http: httpx.Client, four: list[str]) -> str:
    table = "patient_id,x\n" + "\n".join(f"{name},{k % 2}" for k, name in enumerate(four))
    answer = http.post("/v1/heads", files={"labels": table.encode()}, data={"epochs": "1", "folds": "2"}).json()
    assert wait(http, answer["job_id"])["state"] == "done"
    return answer["head_id"]


class TestLabels:
    @pytest.mark.parametrize(
        ("table", "found"),
        [
            (b"", "empty"),
            (b"patient_id,x\n", "empty"),
            (b"name,x\nFOUR-0,1\nFOUR-1,0\n", "'name'"),
            (b"patient_id\nFOUR-0\n", "label column"),
            (b"patient_id,x,x\nFOUR-0,1,1\n", "label column"),
            (b"patient_id,x\nFOUR-0,1\nNOBODY,0\n", "row 3"),
            (b"patient_id,x\nFOUR-0,1\nFOUR-0,0\n", "row 2, 3"),
            (b"patient_id,x\nFOUR-0,yes\nFOUR-1,0\n", "row 2"),
            (b"patient_id,x\nFOUR-0,1,1\nFOUR-1,0\n", "row 2"),
            (b"patient_id,x\nFOUR-0,0\nFOUR-1,0\nFOUR-2,0\nFOUR-3,0\n", "0 positive"),
            (b"patient_id,x\nFOUR-0,1\nFOUR-1,1\nFOUR-2,1\nFOUR-3,1\n", "0 negative"),
            (b"patient_id,x\nFOUR-0,1\n", "1 patients"),
            (b"patient_id,x\nFOUR-0,1\nFOUR-1,?\nFOUR-2,0\nFOUR-3,1\n", "row 3"),
            (b"patient_id,x\nFOUR-0,1\nFOUR-1,\nFOUR-2,0\nFOUR-3,1\n", "row 3"),
            (b"patient_id,split\nFOUR-0,train\nFOUR-1,test\n", "label column"),
            (b"patient_id,x,split\nFOUR-0,1,train\nFOUR-1,0,exam\n", "row 3"),
            (b"patient_id,x,split\nFOUR-0,1,test\nFOUR-1,0,test\n", "split train"),
            (b"patient_id,x,split\nFOUR-0,1,test\nFOUR-1,0,\nFOUR-2,1,\nFOUR-3,0,\n", "3 patients"),
            (b"\xff\xfe\x00", "UTF-8"),
            (b'patient_id,x\n"FOUR-0,1\n', "CSV"),
        ],
    )
    def test_a_table_that_cannot_train(self, http, four, table, found):
        answer = http.post("/v1/heads", files={"labels": ("labels.csv", table)})

        body = problem(answer, 422, "bad-labels")
        assert found in body["detail"]
        assert "NOBODY" not in answer.text

    def test_no_table(self, http):
        problem(http.post("/v1/heads", data={"epochs": "1"}), 422, "invalid-request")

    @pytest.mark.parametrize(
        "option",
        [
            {"epochs": "0"},
            {"folds": "1"},
            {"task": "regression"},
            {"epoch": "3"},
            {"protocol": "leave_one_out"},
            {"baselines": ["mean", "median"]},
            {"network": "probe"},
            {"specificity": "1"},
            {"permutations": "-1"},
        ],
    )
    def test_options_that_are_none(self, http, four, option):
        answer = http.post("/v1/heads", files={"labels": b"patient_id,x\nFOUR-0,1\n"}, data=option)
        problem(answer, 422, "invalid-request")

    def test_one_of_n_with_two_ones(self, http, four):
        table = b"patient_id,x,y\nFOUR-0,1,1\nFOUR-1,0,1\nFOUR-2,1,0\nFOUR-3,0,1\n"
        answer = http.post("/v1/heads", files={"labels": table}, data={"task": "one_of_n"})
        assert "row 2" in problem(answer, 422, "bad-labels")["detail"]

    def test_binary_with_two_labels(self, http, four):
        table = b"patient_id,x,y\nFOUR-0,1,1\nFOUR-1,0,1\nFOUR-2,1,0\nFOUR-3,0,1\n"
        answer = http.post("/v1/heads", files={"labels": table}, data={"task": "binary"})
        assert "2 label columns" in problem(answer, 422, "bad-labels")["detail"]

    def test_splits_and_a_comparison_of_a_head_that_is_not_there(self, http, trained, four):
        table = "patient_id,x\n" + "\n".join(f"{name},{k % 2}" for k, name in enumerate(four))
        answer = http.post("/v1/heads", files={"labels": table.encode()}, data={"splits_of": "none"})
        problem(answer, 404, "head-not-found")
        problem(http.get(f"/v1/heads/{trained}/comparison?with=none"), 404, "head-not-found")
        problem(http.get(f"/v1/heads/none/comparison?with={trained}"), 404, "head-not-found")
        problem(http.get(f"/v1/heads/{trained}/comparison"), 422, "invalid-request")


# A header's or a log line's end, and what would be the next one.
SPLIT = "a\r\nX-Evil: 1"


class TestNames:
    """Nothing that a caller words begins another header, or another line of the log."""

    @pytest.fixture(autouse=True)
    def split_nothing(self, service):
        """Holds of everything that a test of this class did."""
        yield
        log = Path(service_data(service), "keyslice.log").read_text()
        assert "Evil" not in log

    def calls(self, http) -> Iterator[tuple[str, dict[str, str]]]:
        """Every GET, with the same value wherever it takes a text."""
        for path, operations in http.get("/openapi.json").json()["paths"].items():
            if "get" in operations and not path.endswith("/events"):
                taken = [each for each in operations["get"].get("parameters", []) if each["in"] == "query"]
                yield re.sub("{.*?}", quote(SPLIT, safe=""), path), {each["name"]: SPLIT for each in taken}

    def test_of_paths_and_queries(self, http):
        for path, query in self.calls(http):
            for asked in [{}, query, *({name: value} for name, value in query.items())]:
                answer = http.get(path, params=asked)
                assert answer.status_code < 500, (path, asked)
                assert "x-evil" not in answer.headers, (path, asked)

    @pytest.mark.parametrize("end", ["\r\n", "\n", " ", "\t", "\r\nX-Evil: 1"])
    def test_of_a_file_that_is_given_back(self, http, trained, end):
        whole = http.get(f"/v1/heads/{trained}@1/weights")
        assert whole.headers["content-disposition"] == f'attachment; filename="head-{trained}@1.safetensors"'

        for name in (trained, f"{trained}@1"):
            problem(http.get(f"/v1/heads/{name}{quote(end)}/weights"), 404, "head-not-found")

    @pytest.mark.parametrize("pack", [zipped, tarred])
    def test_of_members_that_are_named_in_the_answer(self, http, pack):
        answer = post(http, [("outer", pack([(SPLIT, b"no DICOM" * 100)]))])
        assert [each["file"] for each in problem(answer, 422, "nothing-usable")["set_aside"]] == [SPLIT]
        assert "x-evil" not in answer.headers

    def test_of_a_series(self, http):
        def split(_number, dataset):
            dataset.StudyInstanceUID = SPLIT  # of which a multipart answer would tell the address

        answer = post(http, slice_files(Identity("SPLIT"), count=1, change=split))
        assert problem(answer, 422, "nothing-usable")["set_aside"][0]["reason"] == "invalid_uid"

    def test_of_tags(self, http, small):
        tags = http.put(f"/v1/series/{small}/tags", json={"tags": [SPLIT]})
        assert (tags.status_code, tags.json()["tags"], "x-evil" in tags.headers) == (200, [SPLIT], False)

    @pytest.mark.parametrize("sent", [b"a\r\n X-Evil: 1", b"a\rX-Evil: 1", b"a\nX-Evil: 1", b"a\x0bX-Evil: 1"])
    def test_of_a_request(self, service, sent):
        """Byte by byte: clients refuse to send it."""
        address = urlsplit(service.address)
        head = b"GET /healthz HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n" % address.netloc.encode()
        with socket.create_connection((address.hostname, address.port), timeout=30) as connection:
            connection.sendall(head + b"X-Request-ID: " + sent + b"\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 400 "))
        assert b"Evil" not in answer


class TestSearches:
    @pytest.mark.parametrize(
        "query",
        [
            {},
            {"series_uid": "1.2.3"},
            {"vector": [1.0]},
            {"vector": [1.0], "encoder": "efficientnet_lite0", "series_uid": "1.2.3", "slice": 0, "window": "lung"},
            {"vector": [1.0], "encoder": "efficientnet_lite0", "exclude": "patient"},
            {"series_uid": "1.2.3", "slice": -1, "window": "lung"},
            {"series_uid": "1.2.3", "slice": 0, "window": "lung", "k": 0},
            {"series_uid": "1.2.3", "slice": 0, "window": "lung", "filters": {"hospital": "x"}},
            {"series_uid": "1.2.3", "slice": 0, "window": "lung", "colour": "red"},
        ],
    )
    def test_a_query_that_is_none(self, http, query):
        problem(http.post("/v1/search", json=query), 422, "invalid-request")

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"\\ud800"', b"\xff", b'{"series_uid": "\\ud800"}', b"1e999"])
    def test_a_body_that_is_no_query(self, http, body):
        answer = http.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text

    @pytest.mark.parametrize("opened", [b"[", b'{"filters":', b'{"vector":['])
    def test_a_body_as_deep_as_it_is_long(self, http, opened):
        answer = http.post("/v1/search", content=opened * 500_000, headers={"Content-Type": "application/json"})
        problem(answer, 400, "invalid-request")

    def test_a_form_that_is_none(self, http):
        answer = http.post("/v1/heads", content=b"x", headers={"Content-Type": "multipart/form-data"})
        problem(answer, 400, "invalid-request")

    @pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e308", "0"])
    def test_a_vector_without_direction(self, http, number):
        body = f'{{"encoder": "efficientnet_lite0", "vector": [{", ".join([number] * 1280)}]}}'
        answer = http.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422, answer.text

    def test_a_vector_of_another_length(self, http):
        answer = http.post("/v1/search", json={"encoder": "efficientnet_lite0", "vector": [1.0, 2.0]})
        assert "expected 1280" in problem(answer, 422, "bad-query")["detail"]

    def test_too_many_neighbours(self, http, small):
        answer = http.post("/v1/search", json={"series_uid": small, "slice": 0, "window": "lung", "k": 100_000})
        problem(answer, 422, "bad-query")

    def test_what_is_not_there(self, http, small):
        query = {"series_uid": small, "slice": 0, "window": "lung"}
        problem(http.post("/v1/search", json={**query, "series_uid": "1.2.3"}), 404, "series-not-found")
        problem(http.post("/v1/search", json={**query, "slice": 99}), 404, "slice-not-found")
        problem(http.post("/v1/search", json={**query, "window": "brain"}), 404, "window-not-found")
        problem(http.post("/v1/search", json={**query, "encoder": "resnet"}), 404, "encoder-not-found")

    def test_a_quote_in_a_filter_is_no_query_of_its_own(self, http, small):
        query = {"series_uid": small, "slice": 0, "window": "lung", "filters": {"study_uid": "x' OR '1'='1"}}
        assert http.post("/v1/search", json=query).json()["hits"] == []

    def test_a_filter_for_an_unknown_patient_finds_nothing(self, http, small):
        query = {"series_uid": small, "slice": 0, "window": "lung", "filters": {"patient_id": "NOBODY"}}
        assert http.post("/v1/search", json=query).json()["hits"] == []


def test_a_head_of_another_encoder_is_refused(tmp_path_factory):
    """The same series, but embedded by another encoder than the head's."""
    from safetensors.torch import save_file

    from models.encoders.timm_import import timm
    from service.embedded import in_background

    folder, weights = tmp_path_factory.mktemp("two-encoders"), tmp_path_factory.mktemp("two-weights")
    save_file(timm.create_model("test_mambaout").state_dict(), weights / "test_mambaout.safetensors")
    with (
        in_background(folder, KEYSLICE_WEIGHTS_DIR=str(weights)) as running,
        httpx.Client(base_url=running.address, timeout=60) as http,
    ):
        for number in range(4):
            embed(http, slice_files(Identity(f"MAMBA-{number}"), count=2, seed=number), encoder="test_mambaout")
        embed(http, slice_files(Identity("LITE"), count=2))
        table = "patient_id,x\n" + "\n".join(f"MAMBA-{number},{number % 2}" for number in range(4))
        options = {"encoder": "test_mambaout", "epochs": "1", "folds": "2"}
        head = http.post("/v1/heads", files={"labels": table.encode()}, data=options).json()
        assert wait(http, head["job_id"])["state"] == "done"
        ask = {"head": head["head_id"]}

        bag = http.get(f"/v1/series/{Identity('MAMBA-0').series_uid}/embeddings?encoder=test_mambaout").json()
        assert np.array(bag["embeddings"]).shape == (2, 2, 64)
        assert http.get("/v1/patients/MAMBA-0/predictions", params=ask).status_code == 200
        problem(http.get("/v1/patients/LITE/predictions", params=ask), 409, "other-encoder")
        problem(http.get(f"/v1/series/{Identity('LITE').series_uid}/attention", params=ask), 409, "other-encoder")
