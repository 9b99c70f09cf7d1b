"""A patient's name, id and dates stay in the archive and the catalog."""

from pathlib import Path

import httpx
from posting import embed, post, slice_files

from models.ct.phantom import Identity
from service.embedded import in_background

MARK = "QXZCANARY"


def marked(_number, dataset):
    dataset.PatientName = f"{MARK}NAME^X"
    dataset.PatientBirthDate = "19010203"
    dataset.InstitutionName = f"{MARK}HOSPITAL"
    dataset.AccessionNumber = f"{MARK}ACC"
    dataset.PatientComments = f"{MARK} comments"


def spoiled(number, dataset):
    marked(number, dataset)
    if number == 1:
        dataset.PixelData = dataset.PixelData[:10]
    if number == 2:
        dataset.ImagePositionPatient = None


def test_no_log_store_or_message_names_a_patient(tmp_path):
    patient = f"{MARK}-ID"
    with in_background(tmp_path) as running, httpx.Client(base_url=running.address, timeout=60) as http:
        embed(http, slice_files(Identity(patient), count=4, change=spoiled))
        post(http, [("notes.txt", f"{MARK} notes".encode() * 50)])
        assert http.get("/v1/series", params={"patient_id": patient}).json()["series"][0]["patient_id"] == patient
        errors = [
            http.get(f"/v1/patients/{patient}/predictions?head=none"),
            http.get(f"/v1/patients/{patient}x/predictions"),
            http.post("/v1/heads", files={"labels": f"patient_id,x\n{patient},1\n{patient}2,0\n".encode()}),
            http.post("/v1/search", json={"filters": {"patient_id": patient}}),
        ]

    assert [answer.status_code for answer in errors] == [404, 422, 422, 422]
    assert [answer.text for answer in errors if MARK in answer.text] == []
    places = {path.relative_to(tmp_path).parts[0] for path in files(tmp_path) if MARK.encode() in path.read_bytes()}
    assert places <= {"archive", "catalog.db", "catalog.db-wal"}
    assert "archive" in places
    assert [path for path in files(tmp_path) if MARK in path.name] == []


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]
