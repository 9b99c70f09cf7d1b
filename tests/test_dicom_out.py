"""Predictions as DICOM objects: what they say, whom they point at, and that outside tools find no fault in them."""

import io
import logging
import re
import shutil
import subprocess
import warnings
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pydicom
import pytest
from conftest import missing
from enhanced import write_enhanced
from highdicom.ko import KeyObjectSelectionDocument
from highdicom.sr import EnhancedSR
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from synthetic import random_hu, write_ct

from models.ct.header import read_header
from service.dicom_out.document import DISCLAIMER, to_bytes
from service.dicom_out.key_objects import key_objects
from service.dicom_out.outcome import Outcome, TopImage
from service.dicom_out.report import LONGEST_MEANING, label_code, report
from service.dicom_out.source import SOURCE_ELEMENTS

# What the tools warn of and we cannot help: the source lacks it, or the tool does not know it.
UNAVOIDABLE = [
    r"Warning - Missing attribute or value that would be needed to build DICOMDIR - Study (Time|ID)",  # the source's
    r"Warning - Unrecognized defined term <99KEYSLICE> for value 1 of attribute <Coding Scheme Designator>",  # private
    r"W: The VR checker does not support this Specific Character Set: ISO_IR 192",  # UTF-8
    r"W: Check for template constraints not yet supported",
]


def headers(paths: list[Path]) -> list[Dataset]:
    return [read_header(path, also=SOURCE_ELEMENTS) for path in paths]


def outcome(sources: list[Dataset], **changed) -> Outcome:
    """Of these slices; the last is at the top."""
    named = [(str(each.SeriesInstanceUID), str(each.SOPInstanceUID)) for each in sources]
    whole = Outcome(
        head_id="0123456789ab",
        head_version="fedcba987654",
        encoder_id="efficientnet_lite0@0123456789ab",
        windows=("abdomen", "lung"),
        probabilities={"nodule": 0.123456789, "größer als \\ 3 cm": 0.75},
        instances=tuple(named),
        top=tuple(TopImage(*each, None, 0.5 / (rank + 1)) for rank, each in enumerate(reversed(named))),
        bags=((named[0][0], "c0ffee"),),
        made_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    )
    return replace(whole, **changed)


@pytest.fixture(scope="module", params=["real", "synthetic"])
def sources(request, tmp_path_factory) -> list[Dataset]:
    if request.param == "real":
        return headers(request.getfixturevalue("lidc_0001")[40:43])
    return headers(write_ct(tmp_path_factory.mktemp("synthetic"))[:3])


def both(sources: list[Dataset], **changed) -> dict[str, bytes]:
    said = outcome(sources, **changed)
    return {
        "key objects": to_bytes(key_objects(said, sources[::-1])),
        "report": to_bytes(report(said, sources)),
    }


def read(content: bytes) -> Dataset:
    return pydicom.dcmread(io.BytesIO(content))


@pytest.mark.parametrize("kind", ["key objects", "report"])
@pytest.mark.parametrize("tool", ["dciodvfy", "dsrdump"])
def test_outside_tools_find_no_error_and_warn_of_nothing_we_can_help(sources, tool, kind, tmp_path):
    if shutil.which(tool) is None:
        missing(f"{tool} (Debian dcmtk, dicom3tools) is not installed")
    path = tmp_path / "object.dcm"
    path.write_bytes(both(sources)[kind])

    answer = subprocess.run([tool, path], check=False, capture_output=True, text=True, errors="replace")

    assert answer.returncode == 0, answer.stderr
    said = (answer.stdout + answer.stderr if tool == "dciodvfy" else answer.stderr).splitlines()
    complaints = [line for line in said if re.match(r"[A-Z]\w*\W? ?-? ?", line) and line not in IOD_NAMES]
    assert [line for line in complaints if not any(re.fullmatch(known, line.strip()) for known in UNAVOIDABLE)] == []


IOD_NAMES = ["KeyObjectSelectionDocument", "EnhancedSR"]  # dciodvfy says what it took the object for


def test_key_objects_point_at_the_original_slices_the_highest_first(sources):
    document = KeyObjectSelectionDocument.from_dataset(read(both(sources)["key objects"]))

    references = document.content.get_references()

    expected = [str(each.SOPInstanceUID) for each in reversed(sources)]
    assert [each.referenced_sop_instance_uid for each in references] == expected
    assert {each.referenced_sop_class_uid for each in references} == {sources[0].SOPClassUID}
    for each in sources:
        uids = (each.StudyInstanceUID, each.SeriesInstanceUID, each.SOPInstanceUID)
        assert document.resolve_reference(each.SOPInstanceUID) == uids
    assert document.content[0].name == codes.DCM.OfInterest
    assert document.Modality == "KO"


@pytest.fixture
def frames(tmp_path) -> tuple[list[Dataset], tuple[TopImage, ...]]:
    """The header of a multi-frame file, and three of its frames, the last at the top."""
    (header,) = headers([write_enhanced(tmp_path, random_hu(slices=5))])
    uids = header.SeriesInstanceUID, header.SOPInstanceUID
    return [header], tuple(TopImage(*uids, number, 0.1 * number) for number in (5, 3, 1))


def test_frames_are_pointed_at_by_their_numbers(frames):
    headers, top = frames
    said = outcome(headers, top=top)

    document = KeyObjectSelectionDocument.from_dataset(key_objects(said, headers * 3))
    groups = EnhancedSR.from_dataset(report(said, headers)).content.get_image_measurement_groups()[2:]

    uids = [str(headers[0].SOPInstanceUID)] * 3
    references = document.content.get_references()
    assert [each.referenced_sop_instance_uid for each in references] == uids
    assert [each.referenced_frame_numbers for each in references] == [[5], [3], [1]]
    images = [group.get_measurements()[0].referenced_images[0] for group in groups]
    assert [each.referenced_frame_numbers for each in images] == [[5], [3], [1]]
    assert len({group.tracking_uid for group in groups}) == 3


@pytest.mark.parametrize("kind", ["key objects", "report"])
def test_an_outside_tool_finds_no_error_in_references_to_frames(frames, kind, tmp_path):
    if shutil.which("dciodvfy") is None:
        missing("dciodvfy (Debian dicom3tools) is not installed")
    headers, top = frames
    said = outcome(headers, top=top)
    made = key_objects(said, headers * 3) if kind == "key objects" else report(said, headers)
    path = tmp_path / "object.dcm"
    path.write_bytes(to_bytes(made))

    answer = subprocess.run(["dciodvfy", path], check=False, capture_output=True, text=True, errors="replace")

    assert [line for line in (answer.stdout + answer.stderr).splitlines() if line.startswith("Error")] == []


def test_the_report_names_every_slice_that_was_read(sources):
    document = EnhancedSR.from_dataset(report(outcome(sources, top=()), sources))

    assert sorted(document.get_evidence()) == sorted(
        (each.StudyInstanceUID, each.SeriesInstanceUID, each.SOPInstanceUID, each.SOPClassUID) for each in sources
    )


def test_the_report_says_probabilities_attention_head_and_encoder(sources):
    document = EnhancedSR.from_dataset(read(both(sources)["report"]))

    groups = document.content.get_image_measurement_groups()

    predictions, slices = groups[:2], groups[2:]
    assert [group.finding_type.meaning for group in predictions] == ["nodule", "größer als   3 cm"]
    found = [[(each.name, each.value, each.unit) for each in group.get_measurements()] for group in predictions]
    assert found == [
        [(codes.DCM.Probability, 0.123457, codes.UCUM.NoUnits)],
        [(codes.DCM.Probability, 0.75, codes.UCUM.NoUnits)],
    ]
    pointed = [group.get_measurements()[0] for group in slices]
    assert [each.value for each in pointed] == [0.5, 0.25, 0.166667]
    assert [each.referenced_images[0].referenced_sop_instance_uid for each in pointed] == [
        str(each.SOPInstanceUID) for each in reversed(sources)
    ]
    for group in groups:
        texts = [str(item.value) for item in group[0].ContentSequence if item.ValueType == "TEXT"]
        assert texts[1:] == [
            "Keyslice head 0123456789ab",
            "fedcba987654",
            "encoder efficientnet_lite0@0123456789ab",
            "windows abdomen, lung",
        ]


def test_both_say_that_they_are_for_research(sources):
    documents = {kind: read(content) for kind, content in both(sources).items()}

    for document in documents.values():
        assert DISCLAIMER in "\n".join(each.get("TextValue", "") for each in document.ContentSequence)
        assert "research use only" in document.SeriesDescription
    assert documents["report"].VerificationFlag == "UNVERIFIED"
    assert documents["report"].PreliminaryFlag == "PRELIMINARY"


@pytest.mark.parametrize("kind", ["key objects", "report"])
def test_the_patient_and_study_are_the_sources(sources, kind):
    document, source = read(both(sources)[kind]), sources[0]

    for keyword in ("PatientID", "PatientName", "PatientSex", "PatientBirthDate", "StudyDate", "StudyInstanceUID"):
        assert document[keyword].value == source[keyword].value, keyword
    for keyword in ("AccessionNumber", "StudyID", "StudyTime", "ReferringPhysicianName"):
        assert document[keyword].value == (source.get(keyword) or ""), keyword
    assert document.SeriesInstanceUID != source.SeriesInstanceUID
    assert document.get("DeidentificationMethod") == source.get("DeidentificationMethod")


def test_the_same_prediction_is_the_same_object_byte_for_byte(sources):
    assert both(sources) == both(sources)


@pytest.mark.parametrize(
    "changed",
    [
        {"head_id": "another"},
        {"head_version": "another"},
        {"encoder_id": "another@0"},
        {"bags": (("1.2.3", "slices came later"),)},
        {"made_at": datetime(2027, 1, 1, tzinfo=UTC)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_another_prediction_is_another_object(sources, changed):
    before, after = both(sources), both(sources, **changed)

    uids = [read(content)[name].value for made in (before, after) for content in made.values() for name in UIDS]
    assert len(set(uids)) == 8


UIDS = ["SOPInstanceUID", "SeriesInstanceUID"]


def test_a_report_over_two_studies_is_of_the_first_and_names_both(tmp_path):
    def other_study(_, dataset):
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = "1.2.3", "1.2.3.4"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{dataset.SOPInstanceUID[:-3]}999"

    one = headers(write_ct(tmp_path / "one"))[:2]
    two = headers(write_ct(tmp_path / "two", change=other_study))[:2]

    document = read(to_bytes(report(outcome([*one, *two]), [*one, *two])))

    assert document.StudyInstanceUID == one[0].StudyInstanceUID
    (other,) = document.PertinentOtherEvidenceSequence
    assert other.StudyInstanceUID == "1.2.3"
    referenced = other.ReferencedSeriesSequence[0].ReferencedSOPSequence
    assert {each.ReferencedSOPInstanceUID for each in referenced} == {each.SOPInstanceUID for each in two}


def test_names_in_other_alphabets_arrive(tmp_path):
    def japanese(_, dataset):
        dataset.SpecificCharacterSet = ["", "ISO 2022 IR 87"]
        dataset.PatientName = "Yamada^Tarou=山田^太郎=やまだ^たろう"

    def latin(_, dataset):
        dataset.SpecificCharacterSet = "ISO_IR 100"
        dataset.PatientName, dataset.AccessionNumber = "Müller^Jürgen", "Ä1"

    documents = {}
    for change in (japanese, latin):
        sources = headers(write_ct(tmp_path / change.__name__, change=change))
        documents[change] = [read(content) for content in both(sources).values()]

    for document in documents[japanese]:
        assert str(document.PatientName) == "Yamada^Tarou=山田^太郎=やまだ^たろう"
    for document in documents[latin]:
        assert (str(document.PatientName), document.AccessionNumber) == ("Müller^Jürgen", "Ä1")


MARK = "QXZCANARY"


def malformed(_number, dataset):
    dataset.PatientName = MARK  # one component: highdicom would warn and quote it
    dataset.PatientBirthDate = f"{MARK}-05"
    dataset.PatientSex = f"{MARK} X"
    dataset.StudyTime = f"{MARK}:00"
    dataset.StudyDate = "2020.13.45"
    dataset.AccessionNumber = f"{MARK} longer than sixteen characters"
    dataset.StudyID = f"{MARK}\\2"
    del dataset.StudyInstanceUID  # put back below, so that its element is the last one written
    dataset.StudyInstanceUID = "1.2.3.4"


def test_malformed_elements_are_left_empty_and_no_log_or_warning_quotes_any(tmp_path, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        paths = write_ct(tmp_path, change=malformed)
        warned.clear()
        documents = [read(content) for content in both(headers(paths)[:3]).values()]

    for document in documents:
        assert str(document.PatientName) == MARK
        for keyword in ("PatientBirthDate", "PatientSex", "StudyTime", "StudyDate", "AccessionNumber", "StudyID"):
            assert document[keyword].value in ("", None), keyword
    shown = [str(each.message) for each in warned] + [caplog.text, *capsys.readouterr()]
    assert [text for text in shown if MARK in text or "2020.13" in text] == []


def test_missing_elements_are_there_and_empty(tmp_path):
    def bare(_, dataset):
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime"):
            delattr(dataset, keyword)

    for content in both(headers(write_ct(tmp_path, change=bare))[:3]).values():
        document = read(content)
        assert {str(document[keyword].value or "") for keyword in ("PatientID", "PatientName", "StudyDate")} == {""}


def test_a_removed_identity_says_how_it_was_removed_or_nothing(tmp_path):
    def removed(_, dataset):
        dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", "by hand"

    def unsaid(_, dataset):
        dataset.PatientIdentityRemoved = "YES"

    for change, expected in ((removed, ("YES", "by hand")), (unsaid, (None, None))):
        document = read(both(headers(write_ct(tmp_path / change.__name__, change=change)))["report"])
        assert (document.get("PatientIdentityRemoved"), document.get("DeidentificationMethod")) == expected


@given(st.text())
def test_any_label_has_a_code_that_dicom_can_hold(label):
    code = label_code(label)

    assert re.fullmatch(r"L[0-9a-f]{12}", code.value)
    assert 1 <= len(code.meaning) <= LONGEST_MEANING
    assert code.meaning.isprintable() and "\\" not in code.meaning


def test_labels_that_begin_alike_have_codes_of_their_own():
    assert label_code("a" * 80) != label_code("a" * 81)
