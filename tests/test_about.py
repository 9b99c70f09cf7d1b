"""What the catalog keeps of a slice's header."""

import json

from synthetic import write_slice

from service.about import about_series


def test_what_a_search_asks_for_is_read(tmp_path):
    def change(dataset):
        dataset.StudyDate, dataset.AccessionNumber, dataset.BodyPartExamined = "20200131", "A 7", "chest"
        dataset.Manufacturer, dataset.ConvolutionKernel = "GE MEDICAL SYSTEMS", ["B30f", "3"]
        dataset.NumberOfSeriesRelatedInstances = 12

    about = about_series(write_slice(tmp_path, change))

    header = about.pop("header")
    assert about == {
        "study_date": "20200131",
        "accession_number": "A 7",
        "modality": "CT",
        "body_part": "CHEST",
        "manufacturer": "GE MEDICAL SYSTEMS",
        "kernel": "B30f/3",
        "expected": 12,
    }
    assert header["00080020"] == {"vr": "DA", "Value": ["20200131"]}


def test_a_name_is_read_in_its_character_set(tmp_path):
    def change(dataset):
        dataset.SpecificCharacterSet, dataset.PatientName = "ISO_IR 100", "Müller^Jörg"

    header = about_series(write_slice(tmp_path, change))["header"]

    assert header["00100010"] == {"vr": "PN", "Value": [{"Alphabetic": "Müller^Jörg"}]}


def test_a_malformed_element_is_left_out_and_the_rest_is_kept(tmp_path):
    def change(dataset):
        dataset.add_new("SliceThickness", "LO", "thin")
        dataset.add_new("KVP", "DS", "nan")
        dataset.StudyDescription = "one\0two"
        dataset.StudyDate = "20200131"

    header = about_series(write_slice(tmp_path, change))["header"]

    assert json.dumps(header, allow_nan=False)
    assert "00180060" not in header
    assert header["00081030"]["Value"] == ["onetwo"]
    assert header["00080020"]["Value"] == ["20200131"]
