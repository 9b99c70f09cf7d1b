"""Searches as QIDO-RS asks them: which match, what they answer, what they refuse."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from synthetic import random_hu

from models.ct.phantom import Identity, ct_slice
from service.dicomweb.addresses import Addresses
from service.dicomweb.media import DICOM, DICOM_JSON, JSON, RELATED, Media, chosen
from service.dicomweb.query import parse_query, search
from service.errors import BadDicomWeb, NotAcceptable
from service.intake import collect
from service.settings import Settings
from service.storage.stores import Stores
from service.uploads import StagedFile

WHERE = Addresses("http://keyslice")
JONES, MILLER = Identity("JONES-1"), Identity("MILLER_2")
MILLER_LUNG = Identity("MILLER_2", series="2")


def keep(stores: Stores, folder: Path, identity: Identity, slices: int = 2, **elements: str) -> None:
    folder.mkdir(exist_ok=True)
    files = []
    for number in range(slices):
        dataset = ct_slice(random_hu(1, 16)[0], number * 5.0, number, (5.0, 1.0, 1.0), identity)
        for keyword, value in elements.items():
            setattr(dataset, keyword, value)
        path = folder / f"{identity.series_uid}-{number}"
        dataset.save_as(path, enforce_file_format=True)
        files.append(StagedFile(path, path.name))
    collect(files, "toy@0", stores, Settings(data_dir=folder))


@pytest.fixture
def three(stores: Stores, tmp_path: Path) -> Stores:
    """Three series of two patients."""
    keep(stores, tmp_path / "in", JONES, StudyDate="20200131", PatientName="Jones^Ann^^", AccessionNumber="A_1")
    study = {"StudyDate": "20210615", "StudyTime": "103000", "PatientName": "Müller^Jörg", "AccessionNumber": "A%1"}
    character_set = {"SpecificCharacterSet": "ISO_IR 192"}
    keep(stores, tmp_path / "in", MILLER, 3, **character_set, **study, BodyPartExamined="ABDOMEN")
    keep(stores, tmp_path / "in", MILLER_LUNG, 1, **character_set, **study, BodyPartExamined="CHEST", SeriesNumber="7")
    return stores


def found(stores: Stores, level: str, within: dict[str, str] | None = None, **asked: str) -> list[str]:
    """The UIDs of what a search finds."""
    query = parse_query(level, asked.items(), [], None, 0, **(within or {}))
    key = {"study": "0020000D", "series": "0020000E", "instance": "00080018"}[level]
    return [each[key]["Value"][0] for each in search(query, stores, WHERE).items]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [MILLER, JONES]),
        ({"PatientID": "JONES-1"}, [JONES]),
        ({"00100020": "JONES-1"}, [JONES]),
        ({"PatientID": "jones-1"}, []),
        ({"PatientID": "*-?"}, [JONES]),
        ({"PatientID": "MILLER_2"}, [MILLER]),
        ({"PatientID": "M_LLER_2"}, []),
        ({"PatientID": "M?LLER_*"}, [MILLER]),
        ({"PatientID": "%"}, []),
        ({"PatientID": "[JM]*"}, []),
        ({"PatientName": "jones*"}, [JONES]),
        ({"PatientName": "Jones^Ann"}, [JONES]),
        ({"PatientName": "MÜLLER^JÖRG"}, [MILLER]),
        ({"PatientName": "m?ller*"}, [MILLER]),
        ({"PatientName": ""}, [MILLER, JONES]),
        ({"PatientName": "*"}, [MILLER, JONES]),
        ({"StudyDate": "20200131"}, [JONES]),
        ({"StudyDate": "20200101-20201231"}, [JONES]),
        ({"StudyDate": "20200201-"}, [MILLER]),
        ({"StudyDate": "-20200131"}, [JONES]),
        ({"StudyTime": "10-11"}, [MILLER]),
        ({"StudyTime": "1030"}, [MILLER]),
        ({"StudyTime": "-0959"}, []),
        ({"AccessionNumber": "A_1"}, [JONES]),
        ({"AccessionNumber": "A%1"}, [MILLER]),
        ({"AccessionNumber": "A*"}, [MILLER, JONES]),
        ({"ModalitiesInStudy": "CT"}, [MILLER, JONES]),
        ({"ModalitiesInStudy": "MR"}, []),
        ({"BodyPartExamined": "CHEST"}, [MILLER]),
        ({"SeriesNumber": "7"}, [MILLER]),
        ({"StudyInstanceUID": f"{JONES.study_uid},{MILLER.study_uid}"}, [MILLER, JONES]),
        ({"StudyInstanceUID": JONES.study_uid, "PatientID": "MILLER_2"}, []),
        ({"SeriesInstanceUID": MILLER_LUNG.series_uid}, [MILLER]),
    ],
)
def test_studies_match(three, asked, expected):
    assert found(three, "study", **asked) == [each.study_uid for each in expected]


def test_series_match(three):
    both = sorted([MILLER.series_uid, MILLER_LUNG.series_uid])
    assert found(three, "series") == [*both, JONES.series_uid]
    assert found(three, "series", {"StudyInstanceUID": MILLER.study_uid}) == both
    assert found(three, "series", BodyPartExamined="chest") == [MILLER_LUNG.series_uid]
    assert found(three, "series", PatientName="Jones*", Modality="CT") == [JONES.series_uid]
    assert found(three, "series", {"StudyInstanceUID": MILLER.study_uid}, PatientID="JONES-1") == []


def test_instances_match(three):
    uids = [MILLER.uid("slice", "1", "1", str(number)) for number in range(3)]
    series = {"StudyInstanceUID": MILLER.study_uid, "SeriesInstanceUID": MILLER.series_uid}
    assert found(three, "instance", series) == sorted(uids)
    assert found(three, "instance", series, InstanceNumber="2") == [uids[1]]
    assert found(three, "instance", SOPInstanceUID=f"{uids[2]},1.2.3") == [uids[2]]
    assert found(three, "instance", SOPInstanceUID=uids[2], PatientID="JONES-1") == []
    assert len(found(three, "instance")) == 6


def test_a_study_is_answered_with_its_counts_and_address(three):
    (item,) = search(parse_query("study", [("PatientID", "MILLER_2")], [], None, 0), three, WHERE).items

    assert item["00201206"]["Value"] == [2] and item["00201208"]["Value"] == [4]
    assert item["00080061"] == {"vr": "CS", "Value": ["CT"]}
    assert item["00080056"] == {"vr": "CS", "Value": ["ONLINE"]}
    assert item["00081190"]["Value"] == [f"http://keyslice/dicom-web/studies/{MILLER.study_uid}"]
    assert item["00100010"]["Value"] == [{"Alphabetic": "Müller^Jörg"}]
    assert item["00080090"] == {"vr": "PN"}  # asked of every study, and not known of this one
    assert "00180015" not in item
    assert list(item) == sorted(item)


def test_fields_are_included_where_they_are_asked_for(three):
    def fields(level: str, include: list[str]) -> set[str]:
        return set(search(parse_query(level, [("PatientID", "JONES-1")], include, None, 0), three, WHERE).items[0])

    assert fields("series", ["ConvolutionKernel,00180060", "KVP"]) - fields("series", []) == {"00181210", "00180060"}
    assert fields("instance", ["SliceThickness"]) - fields("instance", []) == {"00180050"}
    assert {"00200032", "00281052"} <= fields("instance", ["all"])
    assert "7FE00010" not in fields("instance", ["all"])


def test_pages_join_without_a_gap(three):
    def page(limit: int | None, offset: int) -> Sequence[str]:
        results = search(parse_query("instance", [], [], limit, offset), three, WHERE)
        return [each["00080018"]["Value"][0] for each in results.items]

    assert [*page(2, 0), *page(3, 2), *page(2, 5)] == page(None, 0)
    assert page(0, 0) == page(5, 6) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"Shoe": "1"},
        {"99999999": "1"},
        {"0010002": "1"},
        {"PixelData": "1"},
        {"SOPInstanceUID": "1.2"},  # of no study
        {"StudyInstanceUID": "1." * 32 + "1"},
        {"StudyInstanceUID": "1.2*"},
        {"StudyDate": "2020"},
        {"StudyDate": "20200101-20200102-20200103"},
        {"StudyDate": "-"},
        {"StudyTime": "noon"},
        {"SeriesNumber": "seven"},
        {"PatientID": "nul\0"},
    ],
)
def test_what_cannot_be_asked_is_refused_without_quoting_the_value(asked):
    with pytest.raises(BadDicomWeb) as caught:
        parse_query("study", asked.items(), [], None, 0)

    assert not any(value in str(caught.value) for value in asked.values() if len(value) > 3)


def test_an_attribute_twice_or_a_field_that_is_none_is_refused():
    with pytest.raises(BadDicomWeb, match="twice"):
        parse_query("study", [("PatientID", "A"), ("00100020", "B")], [], None, 0)
    with pytest.raises(BadDicomWeb, match="'Shoe'"):
        parse_query("study", [], ["KVP,Shoe"], None, 0)


def test_a_pattern_of_many_stars_takes_no_time(three):
    assert found(three, "study", PatientName="*a" * 200 + "b") == []


def test_items_are_json(three):
    for level in ("study", "series", "instance"):
        json.dumps(search(parse_query(level, [], ["all"], None, 0), three, WHERE).items, allow_nan=False)


OFFERED = [Media(RELATED, DICOM), Media(DICOM)]


@pytest.mark.parametrize(
    ("accept", "media", "syntaxes"),
    [
        ("*/*", OFFERED[0], {""}),
        ("application/*", OFFERED[1], {""}),
        ("multipart/related", OFFERED[0], {""}),
        ('multipart/related; type="application/dicom"; transfer-syntax=*', OFFERED[0], {"*"}),
        ("multipart/related;type=application/dicom;transfer-syntax=1.2;q=0.5, application/dicom", OFFERED[1], {""}),
        ('Multipart/Related; type="application/dicom"; transfer-syntax=1.2, */*;q=0.1', OFFERED[0], {"1.2", ""}),
        ("text/html, application/dicom;transfer-syntax=1.2,", OFFERED[1], {"1.2"}),
    ],
)
def test_the_best_of_what_is_accepted_is_chosen(accept, media, syntaxes):
    choice = chosen(accept, OFFERED)
    assert (choice.media, choice.syntaxes) == (media, syntaxes)


@pytest.mark.parametrize("accept", ["text/html", "garbage", ",", "a/b/c", "*/*;q=x", "*/*;q=0", 'a/b;c="', "", "é/é"])
def test_what_nothing_fits_is_not_acceptable(accept):
    with pytest.raises(NotAcceptable):
        chosen(accept, [Media(DICOM_JSON), Media(JSON)])
