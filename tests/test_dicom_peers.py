"""Predictions as DICOM objects over HTTP, and sent to real peers on loopback that the setting names, and no others."""

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pydicom
import pytest
import torch
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from peers import DIM, ENCODER, Scp, StowServer, serving, stored_series
from pydicom.uid import ImplicitVRLittleEndian
from pynetdicom.sop_class import EnhancedSRStorage, KeyObjectSelectionDocumentStorage
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient
from synthetic import IDENTITY, write_ct

from models.abmil import ABMIL, Ensemble
from models.heads.export import to_onnx, to_safetensors
from service.app import create_app
from service.dicom_out.peers import BadPeer, CStore, Stow, parse_peer, parse_peers
from service.settings import Settings
from service.storage.stores import open_stores

KEY_OBJECTS, REPORT = str(KeyObjectSelectionDocumentStorage), str(EnhancedSRStorage)


@pytest.fixture(scope="module")
def stow() -> Iterator[StowServer]:
    store = StowServer()
    app = Starlette(routes=[Route("/{kind}", store.store, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    socket = server.config.bind_socket()
    store.address = f"http://127.0.0.1:{socket.getsockname()[1]}"
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    yield store
    server.should_exit = True
    thread.join()


BOTH_SYNTAXES = ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"]


@pytest.fixture(scope="module")
def scp() -> Iterator[Scp]:
    yield from serving(Scp(), [(KEY_OBJECTS, BOTH_SYNTAXES), (REPORT, BOTH_SYNTAXES)])


@pytest.fixture(scope="module")
def old_scp() -> Iterator[Scp]:
    """One that knows implicit little endian and no structured reports."""
    yield from serving(Scp(), [(KEY_OBJECTS, [ImplicitVRLittleEndian])])


def as_series(number: int, study_date: str):
    """Another series of another study of the same patient."""

    def change(position, dataset):
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = f"1.2.{number}", f"1.2.{number}.1"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.{number}.1.{position + 1}"
        dataset.StudyDate = study_date

    return change


@dataclass
class Place:
    http: TestClient
    head: str
    series: str  # of IDENTITY's study of 2020
    later: str  # of a study of 2024
    volume: str  # of another patient, embedded as one
    raw: str  # not embedded


@pytest.fixture(scope="module")
def place(tmp_path_factory, stow: StowServer, scp: Scp, old_scp: Scp) -> Iterator[Place]:
    """The API in this process over stores with a ready head; nothing needs a broker."""
    root = tmp_path_factory.mktemp("dicom-out")
    kinds = ["plain", "some", "none", "orthanc", "vague", "redirect", "error"]
    ports = [scp.port, old_scp.port]
    peers = [f"{stow.address}/{kind}" for kind in kinds] + [f"dicom://PACS@127.0.0.1:{port}" for port in ports]
    peers += ["dicom://WRONG@127.0.0.1:" + str(scp.port), "http://127.0.0.1:9/away", "dicom://PACS@127.0.0.1:9"]
    settings = Settings(data_dir=root / "data", dicom_peers=", ".join(peers), sweep_seconds=3600)
    stores = open_stores(settings)
    torch.manual_seed(0)
    ensemble = Ensemble([ABMIL(DIM, 2, hidden=8) for _ in range(2)], one_of_n=False).eval()
    _, head = stores.heads.add(ENCODER, ["nodule", "effusion"], {}, {})
    stores.heads.commit(head, to_safetensors(ensemble), to_onnx(ensemble, DIM), {})
    volume = write_ct(root / "volume", change=lambda k, each: (as_series(5, "2021")(k, each), owner(each)))
    with TestClient(create_app(settings)) as http:
        yield Place(
            http=http,
            head=head,
            series=stored_series(stores, write_ct(root / "one"), 1),
            later=stored_series(stores, write_ct(root / "two", change=as_series(3, "20240101")), 2),
            volume=stored_series(stores, volume, 3, kind="volume3d"),
            raw=stored_series(stores, write_ct(root / "raw", change=as_series(7, "2020")), 4, commit=False),
        )
    stores.close()


def owner(dataset):
    dataset.PatientID = "another"


def get(place: Place, what: str, series: str, head: str | None = None):
    return place.http.get(f"/v1/series/{series}/{what}", params={"head": head or place.head})


def post(place: Place, to: dict, **more):
    return place.http.post(f"/v1/series/{place.series}/dicom-out", json={"head": place.head, "to": to, **more})


def test_key_objects_are_the_top_slices_of_the_attention(place):
    attention = get(place, "attention", place.series).json()

    answer = get(place, "key-objects", place.series)

    assert answer.headers["content-type"] == "application/dicom"
    document = pydicom.dcmread(io.BytesIO(answer.content))
    images = [each for each in document.ContentSequence if each.ValueType == "IMAGE"]
    assert [each.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for each in images] == [
        each["sop_uid"] for each in attention["top_slices"]
    ]
    assert answer.headers["content-disposition"] == f'attachment; filename="{document.SOPInstanceUID}.dcm"'


@pytest.mark.parametrize("narrowed", [True, False])
def test_the_report_says_what_predictions_say(place, narrowed):
    patient = f"/v1/patients/{IDENTITY.patient_id}"
    ask = {"head": place.head} | ({"series_uid": place.series} if narrowed else {})
    said = place.http.get(f"{patient}/predictions", params=ask).json()["probabilities"]

    answers = [place.http.get(f"{patient}/report", params=ask)]
    answers += [get(place, "report", place.series)] if narrowed else []

    for answer in answers:
        assert answer.headers["content-type"] == "application/dicom"
        document = pydicom.dcmread(io.BytesIO(answer.content))
        assert numbers(document) == {label: pytest.approx(value, abs=1e-6) for label, value in said.items()}
    assert len({answer.content for answer in answers}) == 1
    assert document.StudyDate == ("20200101" if narrowed else "20240101")  # of several studies, the latest one's
    assert ("PertinentOtherEvidenceSequence" in document) is not narrowed


def numbers(document: pydicom.Dataset) -> dict[str, float]:
    """Probability by label, straight from the tree."""
    (measurements,) = [each for each in document.ContentSequence if each.ValueType == "CONTAINER"]
    found = {}
    for group in measurements.ContentSequence:
        items = {each.ConceptNameCodeSequence[0].CodeMeaning: each for each in group.ContentSequence}
        if "Probability" in items:
            label = items["Finding"].ConceptCodeSequence[0].CodeMeaning
            found[label] = float(items["Probability"].MeasuredValueSequence[0].NumericValue)
    return found


@pytest.mark.parametrize("what", ["key-objects", "report"])
def test_what_cannot_be_said_is_refused_with_its_reason(place, what):
    answers = {
        (404, "urn:keyslice:head-not-found"): get(place, what, place.series, head="none"),
        (404, "urn:keyslice:series-not-found"): get(place, what, "1.2.3.4.5"),
        (409, "urn:keyslice:not-embedded-yet"): get(place, what, place.raw),
        (422, "urn:keyslice:invalid-request"): place.http.get(f"/v1/series/{place.series}/{what}"),
    }
    assert [(each.status_code, each.json()["type"]) for each in answers.values()] == [*answers]


def test_a_volume_has_a_report_and_no_key_objects(place):
    assert get(place, "report", place.volume).status_code == 200
    answer = get(place, "key-objects", place.volume)
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:keyslice:slice-not-found")


def test_c_store_hands_over_the_objects_that_get_answers(place, scp):
    to = {"host": "127.0.0.1", "port": scp.port, "called_ae": "PACS", "calling_ae": "READER"}
    expected = [
        pydicom.dcmread(io.BytesIO(get(place, what, place.series).content)) for what in ("key-objects", "report")
    ]
    scp.received.clear()

    answer = post(place, {"c_store": to})

    assert answer.status_code == 200, answer.text
    assert [each["status"] for each in answer.json()["sent"]] == [0, 0]
    assert [each["kind"] for each in answer.json()["sent"]] == ["key_objects", "report"]
    assert [each["sop_instance_uid"] for each in answer.json()["sent"]] == [each.SOPInstanceUID for each in expected]
    assert scp.received == expected
    assert set(scp.callers) == {"READER"}


def test_c_store_converts_for_a_peer_that_knows_implicit_alone(place, old_scp):
    to = {"host": "127.0.0.1", "port": old_scp.port, "called_ae": "PACS"}

    answer = post(place, {"c_store": to}, kinds=["key_objects"])

    assert answer.status_code == 200, answer.text
    (received,) = old_scp.received
    assert received.file_meta.TransferSyntaxUID == ImplicitVRLittleEndian
    assert received == pydicom.dcmread(io.BytesIO(get(place, "key-objects", place.series).content))
    assert old_scp.callers == ["KEYSLICE"]


def test_an_object_that_the_peer_does_not_know_is_told(place, old_scp):
    answer = post(place, {"c_store": {"host": "127.0.0.1", "port": old_scp.port, "called_ae": "PACS"}})

    assert (answer.status_code, answer.json()["type"]) == (502, "urn:keyslice:peer-failed")
    assert {each["kind"]: each["status"] for each in answer.json()["sent"]} == {"key_objects": 0, "report": 0x0122}


@pytest.mark.parametrize(("status", "expected"), [(0xB000, 200), (0xA700, 502), (0x0110, 502)])
def test_a_warning_is_taken_and_a_refusal_is_told(place, scp, status, expected):
    scp.status = status
    try:
        answer = post(place, {"c_store": {"host": "127.0.0.1", "port": scp.port, "called_ae": "PACS"}})
    finally:
        scp.status = 0

    assert answer.status_code == expected
    assert [each["status"] for each in answer.json()["sent"]] == [status, status]


def test_stow_hands_over_the_objects_that_get_answers(place, stow):
    expected = [
        pydicom.dcmread(io.BytesIO(get(place, what, place.series).content)) for what in ("key-objects", "report")
    ]
    stow.received.clear()

    answer = post(place, {"stow": f"{stow.address}/plain"})

    assert answer.status_code == 200, answer.text
    assert [each["status"] for each in answer.json()["sent"]] == [0, 0]
    assert stow.received == expected
    assert [each.file_meta.MediaStorageSOPInstanceUID for each in stow.received] == [
        each["sop_instance_uid"] for each in answer.json()["sent"]
    ]


@pytest.mark.parametrize(
    ("kind", "statuses"), [("some", [49442, 0]), ("none", [49442, 49442]), ("orthanc", [0, 49442])]
)
def test_a_store_response_says_what_failed(place, stow, kind, statuses):
    answer = post(place, {"stow": f"{stow.address}/{kind}"})

    assert (answer.status_code, answer.json()["type"]) == (502, "urn:keyslice:peer-failed")
    assert [each["status"] for each in answer.json()["sent"]] == statuses


@pytest.mark.parametrize("kind", ["vague", "error"])
def test_an_answer_that_is_none_is_told(place, stow, kind):
    answer = post(place, {"stow": f"{stow.address}/{kind}"})

    assert (answer.status_code, answer.json()["type"]) == (502, "urn:keyslice:peer-failed")


def test_a_peer_that_is_away_is_told(place, scp):
    for to in (
        {"stow": "http://127.0.0.1:9/away"},
        {"c_store": {"host": "127.0.0.1", "port": 9, "called_ae": "PACS"}},
        {"c_store": {"host": "127.0.0.1", "port": scp.port, "called_ae": "WRONG"}},
    ):
        answer = post(place, to)
        assert (answer.status_code, answer.json()["type"]) == (502, "urn:keyslice:peer-failed"), to


def test_a_redirect_is_not_followed(place, stow):
    stow.paths.clear()

    answer = post(place, {"stow": f"{stow.address}/redirect"})

    assert answer.status_code == 502
    assert stow.paths == ["/redirect"]


def test_nothing_is_sent_where_the_setting_does_not_say(place, stow, scp):
    stow.paths.clear()
    scp.received.clear()
    port = scp.port
    for to in (
        {"stow": f"{stow.address}/other"},
        {"stow": f"{stow.address}/plain/../error2"},
        {"stow": f"{stow.address}/plain?x=1"},
        {"stow": f"{stow.address}/plain#x"},
        {"stow": stow.address.replace("http://", "http://user@") + "/plain"},
        {"stow": "http://169.254.169.254/latest/meta-data"},
        {"stow": "file:///etc/passwd"},
        {"stow": "not a url"},
        {"stow": "http://[::1"},
        {"stow": f"dicom://OTHER@127.0.0.1:{port}"},
        {"c_store": {"host": "localhost", "port": port, "called_ae": "PACS"}},
        {"c_store": {"host": "127.0.0.1", "port": port + 1, "called_ae": "PACS"}},
        {"c_store": {"host": "127.0.0.1", "port": port, "called_ae": "OTHER"}},
    ):
        answer = post(place, to)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:keyslice:peer-not-allowed"), to
    assert (stow.paths, scp.received) == ([], [])


def test_without_the_setting_nothing_is_sent_anywhere(place, tmp_path, stow):
    with TestClient(create_app(Settings(data_dir=tmp_path, sweep_seconds=3600))) as http:
        to = {"stow": f"{stow.address}/plain"}
        answer = http.post("/v1/series/1.2/dicom-out", json={"head": "x", "to": to})

    assert (answer.status_code, answer.json()["type"]) == (403, "urn:keyslice:peer-not-allowed")
    assert "KEYSLICE_DICOM_PEERS is unset" in answer.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        {"to": {}},
        {"to": {"stow": "http://a/", "c_store": {"host": "a", "port": 1, "called_ae": "A"}}},
        {"to": {"c_store": {"host": "a", "port": 1, "called_ae": "A" * 17}}},
        {"to": {"c_store": {"host": "a", "port": 1, "called_ae": "A", "calling_ae": "a\\b"}}},
        {"to": {"stow": "http://a/"}, "kinds": []},
        {"to": {"stow": "http://a/"}, "kinds": ["other"]},
    ],
)
def test_a_malformed_order_is_refused(place, body):
    answer = place.http.post(f"/v1/series/{place.series}/dicom-out", json={"head": place.head, **body})

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:keyslice:invalid-request")


def test_peers_are_read_in_their_one_spelling():
    assert parse_peers(" https://Pacs.example:443/studies ,dicom://PACS@Host:104,") == {
        Stow("https://pacs.example/studies"),
        CStore("host", 104, "PACS"),
    }
    assert parse_peer("http://[::1]:8042/dicom-web/studies") == Stow("http://[::1]:8042/dicom-web/studies")
    assert parse_peers("") == frozenset()


@pytest.mark.parametrize(
    "text",
    ["pacs", "ftp://a/b", "dicom://host:104", "dicom://T@host", "dicom://T:p@host:1", "http://u:p@a/", "http://a:x/"],
)
def test_a_setting_that_names_no_peer_is_refused_at_the_start(text, tmp_path):
    with pytest.raises(ValueError, match="dicom_peers"):
        Settings(data_dir=tmp_path, dicom_peers=text)


@given(st.text())
def test_any_text_is_a_peer_or_refused(text):
    try:
        peer = parse_peer(text)
    except BadPeer:
        return
    assert parse_peer(str(peer)) == peer
