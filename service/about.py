"""What a slice's header says of its patient, study and series: as QIDO-RS answers it, and as a search asks for it."""

from pathlib import Path
from typing import Any

from pydicom.dataset import FileDataset

from models.ct.header import read_header, texts
from service.dicom_json import to_json

# Attributes of studies and series (PS3.18 tables 10.6.3-3 and 10.6.3-4), and what tells one CT series from another.
SAID = [
    "AccessionNumber",
    "BodyPartExamined",
    "ContrastBolusAgent",
    "ConvolutionKernel",
    "FrameOfReferenceUID",
    "InstitutionName",
    "IssuerOfPatientID",
    "KVP",
    "Manufacturer",
    "ManufacturerModelName",
    "Modality",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
    "ProtocolName",
    "ReferringPhysicianName",
    "SeriesDate",
    "SeriesDescription",
    "SeriesNumber",
    "SeriesTime",
    "SliceThickness",
    "StationName",
    "StudyDate",
    "StudyDescription",
    "StudyID",
    "StudyTime",
]
LONGEST_TEXT = 200


def about_series(path: Path) -> dict[str, Any]:
    """Columns of SeriesRow, from the header of one of the series' slices. A malformed element is left out."""
    header = read_header(path, also=[*SAID, "NumberOfSeriesRelatedInstances"])
    return {
        "header": to_json(header, SAID),
        "study_date": _text(header, "StudyDate"),
        "accession_number": _text(header, "AccessionNumber"),
        "modality": _text(header, "Modality"),
        "body_part": _text(header, "BodyPartExamined").upper(),
        "manufacturer": _text(header, "Manufacturer"),
        "kernel": _text(header, "ConvolutionKernel"),
        "expected": _count(header, "NumberOfSeriesRelatedInstances"),
    }


def _text(header: FileDataset, keyword: str) -> str:
    try:
        found = "/".join(texts(header, keyword))
    except Exception:  # as above
        return ""
    return found.replace("\0", "").strip()[:LONGEST_TEXT]


def _count(header: FileDataset, keyword: str) -> int | None:
    try:
        return int(header.get(keyword)) or None
    except (TypeError, ValueError, OverflowError):
        return None
