"""The header of an archived slice: what a document says of the image, and of whom and which study it is."""

from typing import Any

from pydicom import config
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.valuerep import validate_value

# Elements that a document about a slice takes over, beside those of models/ct/header.py.
SUBJECT_TYPE_2 = [  # Patient Module (PS3.3 C.7.1.1) and General Study Module (C.7.2.1): there, or there and empty
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
]
SUBJECT_TYPE_3 = ["IssuerOfPatientID", "StudyDescription"]
DEIDENTIFICATION = ["PatientIdentityRemoved", "DeidentificationMethod", "DeidentificationMethodCodeSequence"]
SOURCE_ELEMENTS = [*SUBJECT_TYPE_2, *SUBJECT_TYPE_3, *DEIDENTIFICATION]

SEXES = ("M", "F", "O")


def subject(header: Dataset) -> Dataset:
    """The patient's and study's elements. One that is missing or malformed is empty, or left out where it may be.

    Text becomes UTF-8. The message of no exception and no warning holds a value of them.
    """
    answer = Dataset()
    answer.SpecificCharacterSet = "ISO_IR 192"
    answer.StudyInstanceUID = header.StudyInstanceUID
    for keyword in SUBJECT_TYPE_2:
        setattr(answer, keyword, _valid(header, keyword) or "")
    if answer.PatientSex not in SEXES:
        answer.PatientSex = ""
    for keyword in SUBJECT_TYPE_3:
        if value := _valid(header, keyword):
            setattr(answer, keyword, value)
    _say_deidentified(header, answer)
    return answer


def image(header: Dataset) -> Dataset:
    """What names the image; the patient's and study's elements are there and empty, as highdicom asks."""
    answer = Dataset()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        setattr(answer, keyword, header[keyword].value)
    for keyword in SUBJECT_TYPE_2:
        setattr(answer, keyword, "")
    answer.Rows, answer.Columns = header.Rows, header.Columns  # what highdicom knows an image by
    return answer


def _valid(header: Dataset, keyword: str) -> Any:
    """The element's value where it is a single one and keeps the rules of its VR (PS3.5 6.2), else None."""
    try:
        value = header.get(keyword)
        if value is None or isinstance(value, MultiValue):
            return None
        validate_value(dictionary_VR(keyword), str(value), config.RAISE)
    except Exception:  # whatever pydicom makes of a malformed element; its message would quote the value
        return None
    return value


def _say_deidentified(header: Dataset, answer: Dataset) -> None:
    """Whether and how the identity was removed (PS3.3 C.7.1.1): one is not there without the other."""
    removed = _valid(header, "PatientIdentityRemoved")
    method, codes = header.get("DeidentificationMethod"), header.get("DeidentificationMethodCodeSequence")
    if removed == "NO" or (removed == "YES" and (method or codes)):
        answer.PatientIdentityRemoved = removed
        if removed == "YES" and method:
            answer.DeidentificationMethod = method
        if removed == "YES" and codes:
            answer.DeidentificationMethodCodeSequence = codes
