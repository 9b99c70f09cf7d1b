"""`keyslice predict`: from DICOM to predictions, by a running service and by one of its own."""

import json
import socket
import zipfile

import pytest
from posting import slice_files
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service.cli import app
from service.client import Keyslice
from service.embedded import in_background

SOME_FAILED = 3


def send(folder, identity, count=2):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (_, content) in enumerate(slice_files(identity, count=count)):
        (folder / f"{identity.patient_id}-{number}.dcm").write_bytes(content)
    return folder


def trained(client, folder, name):
    """A head over four patients."""
    patients = [Identity(f"{name}-{k}") for k in range(4)]
    for each in patients:
        send(folder / "cohort", each)
    client.wait(client.upload(folder / "cohort"), timeout=120)
    lines = ["patient_id,lesion", *(f"{each.patient_id},{k % 2}" for k, each in enumerate(patients))]
    (folder / "labels.csv").write_text("\n".join(lines))
    head = client.train(folder / "labels.csv", name=name, folds=2, epochs=1, permutations=0, hidden=8, attention=4)
    client.wait(head, timeout=120)
    return head.head_id


@pytest.fixture(scope="module")
def head(service, tmp_path_factory):
    with Keyslice(service.address) as client:
        return trained(client, tmp_path_factory.mktemp("predict"), "predicted")


def predict(*arguments):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def test_each_patient_is_predicted_as_the_service_would(service, http, head, tmp_path):
    archive = tmp_path / "two.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for who in ("PREDICT-A", "PREDICT-B"):
            for number, (_, content) in enumerate(slice_files(Identity(who), count=2)):
                file.writestr(f"{who}/{number}.dcm", content)

    result = predict(archive, "--head", "predicted", "--json", "--service", service.address)

    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [each["patient_id"] for each in found] == ["PREDICT-A", "PREDICT-B"]
    for each in found:
        asked = http.get(f"/v1/patients/{each['patient_id']}/predictions?head={head}").json()
        assert each["probabilities"] == asked["probabilities"]
        assert each["head_id"] == head
    assert "of 4 slices" in result.stderr


def test_people_read_a_table(service, head, tmp_path):
    result = predict(send(tmp_path / "one", Identity("PREDICT-C")), "--head", head, "--service", service.address)

    assert result.exit_code == 0, result.stderr
    assert "Predictions for PREDICT-C by head predicted@1" in result.stdout
    assert "lesion" in result.stdout


def test_a_series_that_cannot_be_embedded_is_named_and_the_others_are_predicted(service, head, tmp_path):
    folder = send(tmp_path / "mixed", Identity("PREDICT-D"))
    broken = Identity("PREDICT-E")
    for path in send(tmp_path / "broken", broken).iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[:-1000])

    result = predict(folder, "--head", head, "--json", "--service", service.address)

    assert result.exit_code == SOME_FAILED, result.stderr
    assert [each["patient_id"] for each in json.loads(result.stdout)] == ["PREDICT-D"]
    assert f"series {broken.series_uid} is rejected" in result.stderr


def test_what_cannot_be_is_said_before_anything_is_sent(service, http, tmp_path):
    folder = send(tmp_path / "unsent", Identity("PREDICT-F"))

    unknown = predict(folder, "--head", "nobody", "--service", service.address)
    absent = predict(tmp_path / "absent", "--head", "nobody", "--service", service.address)

    assert (unknown.exit_code, unknown.stderr[:4]) == (1, "404:")
    assert absent.exit_code == 2
    assert http.get("/v1/series", params={"patient_id": "PREDICT-F"}).json()["series"] == []


def test_it_needs_no_service_that_runs(tmp_path, monkeypatch):
    data = tmp_path / "data"
    with in_background(data) as running, Keyslice(running.address) as client:
        trained(client, tmp_path, "alone")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("KEYSLICE_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(data))

    result = predict(send(tmp_path / "new", Identity("ALONE-NEW")), "--head", "alone", "--json")

    assert result.exit_code == 0, result.stderr
    (found,) = json.loads(result.stdout)
    assert 0 < found["probabilities"]["lesion"] < 1
