"""With KEYSLICE_PSEUDONYM_KEY nothing that arrives is kept under the name it came with, whichever way it comes."""

import io
import re
import time
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from posting import embed, post, read, slice_files, wait
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE
from pynetdicom.sop_class import CTImageStorage
from searching import three_indexed
from test_receiver import free_port
from typer.testing import CliRunner

from models.ct.decode import read_hu
from models.ct.multiframe import is_multiframe
from models.ct.phantom import Identity
from models.ct.reasons import Reason
from models.ct.screening import SetAside, screened_header
from service.cli import app
from service.embedded import CannotStart, in_background, up
from service.pseudonyms import LONGEST_DAYS, Pseudonyms
from service.settings import Settings
from service.storage.pseudonym_key import OtherPseudonymKey
from service.storage.stores import open_stores

KEY = "k" * 32
NAMES = Pseudonyms(KEY.encode())
MARK = "QXZWHO"


def test_a_pseudonym_is_of_its_key_and_its_original_alone():
    other = Pseudonyms(b"o" * 32)

    assert NAMES.patient("A") == Pseudonyms(KEY.encode()).patient(" A ") != NAMES.patient("B")
    assert NAMES.patient("A") != other.patient("A") and NAMES.fingerprint != other.fingerprint
    assert NAMES.uid("1.2.3") != NAMES.uid("1.2.4")
    assert re.fullmatch(r"2\.25\.[1-9][0-9]{0,38}", NAMES.uid("1.2.3"))
    assert NAMES.uid("1.2.840.10008.1.2.1") == "1.2.840.10008.1.2.1"
    days = [NAMES.days(str(number)) for number in range(200)]
    assert 1 <= min(days) < max(days) <= LONGEST_DAYS and len(set(days)) > 150


def marked(number: int, dataset: Dataset, patient: str = f"{MARK}-1") -> None:
    """Who it is of, said everywhere a header can say it."""
    dataset.PatientID, dataset.PatientName, dataset.PatientBirthDate = patient, f"{MARK}^Jane", "19310203"
    dataset.OtherPatientIDs, dataset.PatientComments, dataset.PatientAddress = MARK, MARK, MARK
    dataset.InstitutionName = dataset.StationName = dataset.DeviceSerialNumber = MARK
    dataset.ReferringPhysicianName = dataset.OperatorsName = f"{MARK}^Doc"
    dataset.AccessionNumber, dataset.StudyID, dataset.RequestingService = MARK, MARK, MARK
    dataset.StudyDescription = dataset.SeriesDescription = dataset.ProtocolName = dataset.ImageComments = MARK
    dataset.StudyDate, dataset.SeriesDate, dataset.ContentDate = "20200228", "20200301", "202003"
    dataset.AcquisitionDateTime, dataset.StudyTime = "20200301101112.5+0100", "101112"
    block = dataset.private_block(0x0099, f"{MARK} private", create=True)
    block.add_new(1, "LO", MARK)
    dataset.add_new(0x60003000, "OW", MARK.encode() * 2)
    dataset.add_new(0x00091001, "UN", MARK.encode())
    source = Dataset()
    source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    source.PersonName, source.ContentDate = f"{MARK}^Inner", "20200302"
    dataset.SourceImageSequence = [source]
    request = Dataset()
    request.RequestedProcedureDescription, request.ScheduledProcedureStepID = MARK, MARK
    dataset.RequestAttributesSequence = [request]


def rewritten(folder: Path, content: bytes) -> tuple[Dataset, bytes]:
    path = folder / "file"
    path.write_bytes(content)
    assert NAMES.rewrite(path) is None
    return pydicom.dcmread(path), path.read_bytes()


def test_a_file_says_no_more_who_it_is_of(tmp_path):
    ((_, content),) = slice_files(Identity("X"), count=1, change=marked)
    before, (after, written) = pydicom.dcmread(io.BytesIO(content)), rewritten(tmp_path, content)
    days = NAMES.days(f"{MARK}-1")

    originals = [MARK, "19310203", "20200228", "20200301", str(before.StudyInstanceUID), str(before.SOPInstanceUID)]
    assert [text for text in originals if text.encode() in written] == []
    assert after.PatientID == str(after.PatientName) == NAMES.patient(f"{MARK}-1")
    assert after.SOPInstanceUID == after.file_meta.MediaStorageSOPInstanceUID == NAMES.uid(before.SOPInstanceUID)
    assert after.SourceImageSequence[0].ReferencedSOPInstanceUID == after.SOPInstanceUID
    assert after.SourceImageSequence[0].ReferencedSOPClassUID == CTImageStorage
    shifted = np.datetime64("2020-02-28") - days
    assert after.StudyDate == str(shifted).replace("-", "")
    assert after.SeriesDate == str(shifted + 2).replace("-", "")
    assert after.AcquisitionDateTime == after.SeriesDate + "101112.5+0100"
    assert (after.StudyTime, after.ContentDate, after.PatientBirthDate) == ("101112", "", "")
    assert (after.PatientIdentityRemoved, after.LongitudinalTemporalInformationModified) == ("YES", "MODIFIED")
    assert [each.CodeValue for each in after.DeidentificationMethodCodeSequence] == ["113100", "113107"]
    assert after.PixelData == before.PixelData
    assert not [element for element in after if element.tag.is_private]


def test_the_same_file_becomes_the_same_bytes(tmp_path):
    ((_, content),) = slice_files(Identity("X"), count=1, change=marked)

    assert rewritten(tmp_path, content)[1] == rewritten(tmp_path, content)[1]


@pytest.mark.parametrize("value", ["2020", "20201332", "00010101", "words"])
def test_what_is_no_date_is_emptied(tmp_path, value):
    def change(number, dataset):
        dataset.StudyDate = value

    ((_, content),) = slice_files(Identity("X"), count=1, change=change)
    assert rewritten(tmp_path, content)[0].StudyDate == ""


def test_real_headers_name_nobody_and_their_slices_are_the_same(data, lidc_0001, tmp_path):
    tried = 0
    for source in [lidc_0001[0], *sorted(path for path in data.rglob("*") if path.is_file())]:
        path = tmp_path / "file.dcm"
        path.unlink(missing_ok=True)
        path.symlink_to(source)
        if isinstance(screened_header(path), SetAside):
            continue
        path.unlink()
        path.write_bytes(source.read_bytes())
        before, frames = pydicom.dcmread(path), is_multiframe(screened_header(path))
        hu = None if frames else read_hu(path)
        assert NAMES.rewrite(path) is None, source.name
        after, written = pydicom.dcmread(path), path.read_bytes()
        assert not isinstance(screened_header(path), SetAside)
        if hu is not None:
            assert np.array_equal(read_hu(path), hu)
        for keyword in ("PatientID", "PatientName", "AccessionNumber", "InstitutionName", "StationName"):
            original = str(before.get(keyword) or "").strip()
            if len(original) > 3:
                assert original.encode() not in written, (source.name, keyword)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
            if original := str(before.get(keyword) or ""):
                assert original.encode() not in written, (source.name, keyword)
                assert after[keyword].value == NAMES.uid(original)
        for keyword in ("StudyDate", "AcquisitionDate"):
            if original := str(before.get(keyword) or ""):
                assert original.encode() not in written, (source.name, keyword)
        tried += 1
    assert tried > 20


def test_a_name_burned_in_is_set_aside(tmp_path):
    def change(number, dataset):
        dataset.BurnedInAnnotation = "YES"

    ((_, content),) = slice_files(Identity("X"), count=1, change=change)
    (tmp_path / "file").write_bytes(content)

    assert NAMES.rewrite(tmp_path / "file").reason is Reason.BURNED_IN


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pseudonyms")


@pytest.fixture(scope="module")
def served(place):
    """A service with the key, and the port of its receiver."""
    port = free_port()
    exports = place / "exports"
    exports.mkdir()
    variables = {"KEYSLICE_PSEUDONYM_KEY": KEY, "KEYSLICE_EXPORT_ROOTS": str(exports), "KEYSLICE_SWEEP_SECONDS": "1"}
    variables |= {"KEYSLICE_RECEIVE_PORT": str(port), "KEYSLICE_SERIES_QUIET_SECONDS": "1"}
    with in_background(place / "data", **variables) as running:
        yield running, port


@pytest.fixture(scope="module")
def client(served):
    with httpx.Client(base_url=served[0].address, timeout=120) as http:
        yield http


def holding(root: Path, mark: str) -> list[str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return [path.name for path in files if mark.encode() in path.read_bytes() or mark in str(path)]


def sent(name: str, seed: int) -> tuple[Identity, list[tuple[str, bytes]]]:
    identity = Identity(f"{MARK}-{name}")
    return identity, slice_files(identity, count=3, seed=seed, change=partial(marked, patient=identity.patient_id))


def here(http: httpx.Client, identity: Identity) -> dict:
    """The series once it is embedded."""
    for _ in range(600):
        answer = http.get(f"/v1/series/{NAMES.uid(identity.series_uid)}")
        if answer.status_code == 200 and answer.json()["state"] == "indexed":
            return answer.json()
        time.sleep(0.1)
    raise AssertionError(answer.text)


def check_nothing_of(place: Path, identity: Identity) -> None:
    for mark in (MARK, identity.series_uid, identity.study_uid, "19310203", "20200228"):
        assert holding(place / "data", mark) == [], mark


def test_a_post_is_kept_under_its_pseudonyms_and_embedded_as_ever(client, place, http):
    identity, files = sent("post", 1)
    (series,) = embed(client, files)["series"]
    embed(http, files)

    assert series["series_uid"] == NAMES.uid(identity.series_uid)
    found = here(client, identity)
    assert found["patient_id"] == NAMES.patient(identity.patient_id)
    pseudonymous = client.get(f"/v1/series/{series['series_uid']}/embeddings").json()["embeddings"]
    assert pseudonymous == http.get(f"/v1/series/{identity.series_uid}/embeddings").json()["embeddings"]
    again = post(client, files).json()["series"][0]
    assert (again["received"], again["duplicates"]) == (0, 3)
    check_nothing_of(place, identity)


def test_stow_answers_where_it_is_kept(served, client, place):
    identity, files = sent("stow", 2)
    datasets = [pydicom.dcmread(io.BytesIO(content)) for _, content in files]

    answer = DICOMwebClient(f"{served[0].address}/dicom-web").store_instances(datasets)

    stored = answer.ReferencedSOPSequence
    assert [each.ReferencedSOPInstanceUID for each in stored] == [each.SOPInstanceUID for each in datasets]
    assert str(answer.RetrieveURL).endswith(f"/studies/{NAMES.uid(identity.study_uid)}")
    retrieved = httpx.get(str(stored[0].RetrieveURL), headers={"Accept": "application/dicom"}).raise_for_status()
    assert NAMES.patient(identity.patient_id).encode() in retrieved.content
    here(client, identity)
    check_nothing_of(place, identity)


def test_c_store(served, client, place):
    identity, files = sent("store", 3)
    sender = AE(ae_title="SCANNER")
    sender.add_requested_context(CTImageStorage)
    association = sender.associate("127.0.0.1", served[1], ae_title="KEYSLICE")
    statuses = [association.send_c_store(pydicom.dcmread(io.BytesIO(content))).Status for _, content in files]
    association.release()

    assert statuses == [0, 0, 0]
    here(client, identity)
    check_nothing_of(place, identity)


def test_an_export(client, place):
    identity, files = sent("export", 4)
    for name, content in files:
        (place / "exports" / name).write_bytes(content)

    job = client.post("/v1/exports", json={"uri": str(place / "exports")}).raise_for_status().json()
    assert wait(client, job["job_id"])["state"] == "done"

    assert here(client, identity)["received"] == 3
    check_nothing_of(place, identity)


def test_a_name_burned_in_is_kept_nowhere(client, place):
    def change(number, dataset):
        marked(number, dataset)
        dataset.BurnedInAnnotation = "YES"

    answer = post(client, slice_files(Identity(f"{MARK}-burned"), count=1, change=change))

    assert answer.status_code == 422
    assert answer.json()["set_aside"][0]["reason"] == "burned_in"
    assert MARK not in answer.text
    check_nothing_of(place, Identity(f"{MARK}-burned"))


def test_a_patient_is_erased_by_the_pseudonym(client, place):
    identity, files = sent("erased", 5)
    embed(client, files)

    assert client.delete(f"/v1/patients/{identity.patient_id}").status_code == 404
    assert client.delete(f"/v1/patients/{NAMES.patient(identity.patient_id)}").json()["series"] == 1
    assert holding(place / "data", NAMES.uid(identity.series_uid)) == []


def test_two_studies_of_a_real_patient_stay_one_patients(client, lidc_0001):
    def called(dataset: Dataset) -> bytes:
        content = io.BytesIO()
        dataset.save_as(content)
        return content.getvalue()

    first = read(lidc_0001[:2])
    again = [pydicom.dcmread(path) for path in lidc_0001[:2]]
    study, series = generate_uid(), generate_uid()
    for each in again:
        each.StudyInstanceUID, each.SeriesInstanceUID = study, series
        each.SOPInstanceUID = each.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    embed(client, first)
    embed(client, [(f"{k}.dcm", called(each)) for k, each in enumerate(again)])

    patient = NAMES.patient(str(again[0].PatientID))
    found = client.get("/v1/series", params={"patient_id": patient}).json()["series"]
    assert {each["study_uid"] for each in found} >= {NAMES.uid(study)} and len(found) == 2


class TestKey:
    def opened(self, folder: Path, key: str | None) -> None:
        open_stores(Settings(data_dir=folder, pseudonym_key=key)).close()

    def test_the_first_stays(self, tmp_path):
        self.opened(tmp_path, KEY)
        self.opened(tmp_path, KEY)
        with pytest.raises(OtherPseudonymKey, match="another"):
            self.opened(tmp_path, "o" * 32)
        with pytest.raises(OtherPseudonymKey, match="no KEYSLICE"):
            self.opened(tmp_path, None)
        assert KEY.encode() not in (tmp_path / "catalog.db").read_bytes()

    def test_a_service_with_another_does_not_start(self, tmp_path):
        self.opened(tmp_path, KEY)
        with pytest.raises(CannotStart, match="expected the one that the series here came under"):
            up(Settings(data_dir=tmp_path, pseudonym_key="o" * 32))

    def test_what_came_without_one_stays_without(self, tmp_path):
        three_indexed(Settings(data_dir=tmp_path)).close()
        with pytest.raises(OtherPseudonymKey, match="came without"):
            self.opened(tmp_path, KEY)
        self.opened(tmp_path, None)

    def test_a_short_one_is_refused_and_none_is_shown(self, tmp_path):
        with pytest.raises(ValueError, match="pseudonym_key"):
            Settings(pseudonym_key="short")
        assert KEY not in repr(Settings(pseudonym_key=KEY))


def test_the_command_tells_pseudonyms_of_lines(monkeypatch):
    monkeypatch.setenv("KEYSLICE_PSEUDONYM_KEY", KEY)
    told = CliRunner().invoke(app, ["pseudonym"], input="A\n\n B \n")
    uid = CliRunner().invoke(app, ["pseudonym", "--uid", "1.2.3"])
    monkeypatch.delenv("KEYSLICE_PSEUDONYM_KEY")
    without = CliRunner().invoke(app, ["pseudonym", "A"])

    assert told.stdout.split() == [NAMES.patient("A"), NAMES.patient("B")]
    assert uid.stdout.strip() == NAMES.uid("1.2.3")
    assert without.exit_code == 2
