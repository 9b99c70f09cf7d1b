"""A patient's name, id and dates stay in the archive and the catalog."""

import json
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from posting import embed, post, slice_files

from models.ct.phantom import Identity
from service.embedded import in_background
from service.settings import Settings
from service.storage.audit import Audit
from service.storage.chain import Chain
from service.storage.database import Database

MARK, GONE = "QXZCANARY", "QXZERASED"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("privacy")


@pytest.fixture(scope="module")
def http(folder):
    with in_background(folder) as running, httpx.Client(base_url=running.address, timeout=60) as client:
        yield client


def marked(_number, dataset, mark=MARK):
    dataset.PatientName = f"{mark}NAME^X"
    dataset.PatientBirthDate = "19010203"
    dataset.InstitutionName = f"{mark}HOSPITAL"
    dataset.AccessionNumber = f"{mark}ACC"
    dataset.PatientComments = f"{mark} comments"


def spoiled(number, dataset):
    marked(number, dataset)
    if number == 1:
        dataset.PixelData = dataset.PixelData[:10]
    if number == 2:
        dataset.ImagePositionPatient = None


def test_no_log_store_or_message_names_a_patient(http, folder):
    patient = f"{MARK}-ID"
    embed(http, slice_files(Identity(patient), count=4, change=spoiled))
    post(http, [("notes.txt", f"{MARK} notes".encode() * 50)])
    assert http.get("/v1/series", params={"patient_id": patient}).json()["series"][0]["patient_id"] == patient
    errors = [
        http.get(f"/v1/patients/{patient}/predictions?head=none"),
        http.get(f"/v1/patients/{patient}x/predictions"),
        http.post("/v1/heads", files={"labels": f"patient_id,x\n{patient},1\n{patient}2,0\n".encode()}),
        http.post("/v1/search", json={"filters": {"patient_id": patient}}),
        http.delete(f"/v1/patients/{patient}x"),
    ]

    assert [answer.status_code for answer in errors] == [404, 422, 422, 422, 404]
    assert [answer.text for answer in errors if MARK in answer.text] == []
    places = {path.relative_to(folder).parts[0] for path in files(folder) if MARK.encode() in path.read_bytes()}
    assert places <= {"archive", "catalog.db", "catalog.db-wal"}
    assert "archive" in places
    assert [path for path in files(folder) if MARK in path.name] == []


def test_an_erased_patient_is_in_no_file_of_a_running_service(http, folder):
    gone, stays = Identity(f"{GONE}-ID"), Identity("ERASE-STAYS")
    embed(http, slice_files(gone, count=4, seed=1, change=partial(marked, mark=GONE)))
    embed(http, slice_files(stays, count=4, seed=2))
    there = http.get(f"/v1/series/{gone.series_uid}/embeddings").json()
    texts = [GONE, gone.series_uid, gone.study_uid, *(each["sop_uid"] for each in there["slices"])]
    marks = [*map(str.encode, texts), np.float16(there["embeddings"][2][0]).tobytes()]
    before = [holding(folder, mark) for mark in marks]

    answers = [http.delete(f"/v1/patients/{gone.patient_id}") for _ in range(2)]

    receipt = answers[0].json()
    assert [answer.status_code for answer in answers] == [200, 404]
    assert all(before)
    assert [holding(folder, mark) for mark in marks] == [[] for _ in marks]
    assert (receipt["series"], receipt["removed"]["archive_files"], receipt["heads"]) == (1, 4, [])
    assert receipt == http.get(f"/v1/erasures/{receipt['erasure_id']}").json()
    assert receipt["erased_at"] and GONE not in str(receipt)
    assert http.get(f"/v1/series/{stays.series_uid}").json()["state"] == "indexed"
    audit = Audit(Database(Settings(data_dir=folder).catalog_url), Chain())
    entries = [json.loads(row.entry) for row in audit.list()]
    (asked,) = [each for each in entries if each["kind"] == "erase" and each["outcome"] == "done"]
    (erased,) = [each for each in entries if each.get("about", {}).get("removed") == receipt["removed"]]
    of_gone = [each["kind"] for each in entries if asked["series"][0] in each.get("series", [])]
    assert asked["about"]["erasure"] == erased["about"]["erasure"] == receipt["erasure_id"]
    assert of_gone == ["upload", "embeddings.read", "erase"]
    assert audit.verify().wrong is None


def holding(root: Path, mark: bytes) -> list[str]:
    return [path.name for path in files(root) if mark in path.read_bytes() or mark in str(path).encode()]


def files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file()]
