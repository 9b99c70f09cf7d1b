"""DICOMweb: UIDs, the DICOM JSON model, multipart bodies and search parameters, as the OpenAPI publishes them."""

from typing import Annotated, Any

from fastapi import Path

from service.dicomweb.media import DICOM, DICOM_JSON, JSON, OCTETS, RELATED

Uid = Annotated[str, Path(max_length=64, pattern=r"^[0-9]+(\.[0-9]+)*$", description="a DICOM UID (PS3.5 9.1)")]

BINARY: dict[str, Any] = {"type": "string", "format": "binary"}

# PS3.18 F.2.2.
DATASET: dict[str, Any] = {
    "type": "object",
    "description": "a dataset in the DICOM JSON model: elements by their tags",
    "additionalProperties": False,
    "patternProperties": {
        "^[0-9A-F]{8}$": {
            "type": "object",
            "required": ["vr"],
            "additionalProperties": False,
            "properties": {
                "vr": {"type": "string", "pattern": "^[A-Z]{2}$"},
                "Value": {"type": "array"},
                "BulkDataURI": {"type": "string"},
                "InlineBinary": {"type": "string"},
            },
        }
    },
}

Answers = dict[int | str, dict[str, Any]]


def as_dicom_json(schema: dict[str, Any]) -> dict[str, Any]:
    return {media: {"schema": schema} for media in (DICOM_JSON, JSON)}


DATASETS: Answers = {200: {"content": as_dicom_json({"type": "array", "items": DATASET})}}
FOUND: Answers = DATASETS | {204: {"description": "Nothing matches"}}
STORED: Answers = {
    200: {"description": "All stored", "content": as_dicom_json(DATASET)},
    202: {"description": "Some stored; FailedSOPSequence says which not", "content": as_dicom_json(DATASET)},
    409: {"description": "None stored", "content": as_dicom_json(DATASET)},
}
FILES: Answers = {200: {"content": {RELATED: {"schema": BINARY}, DICOM: {"schema": BINARY}}}}
OCTET_PARTS: Answers = {200: {"content": {RELATED: {"schema": BINARY}, OCTETS: {"schema": BINARY}}}}
PICTURE: Answers = {200: {"content": {kind: {"schema": BINARY} for kind in ("image/jpeg", "image/png")}}}

STORE_BODY = {
    "requestBody": {
        "required": True,
        "description": f'{RELATED}; type="{DICOM}"; boundary=...: one DICOM file per part',
        "content": {RELATED: {"schema": BINARY}},
    }
}


def search_parameters(*keywords: str) -> dict[str, Any]:
    """The attributes most often asked for; docs/dicomweb.md has them all. Each may be spelled as a tag."""
    parameters = [{"name": each, "in": "query", "required": False, "schema": {"type": "string"}} for each in keywords]
    return {"parameters": parameters}


OF_STUDY = ["PatientID", "PatientName", "StudyDate", "AccessionNumber", "ModalitiesInStudy"]
OF_SERIES = ["Modality", "BodyPartExamined"]
