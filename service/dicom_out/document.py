"""What key objects and report have in common: identity, equipment, whom and which study they are of."""

import io
import json
import uuid
from importlib.metadata import version
from typing import Any

from highdicom.coding_schemes import CodingSchemeIdentificationItem
from highdicom.sr import CodedConcept, DeviceObserverIdentifyingAttributes, ObserverContext
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID
from pydicom.valuerep import DA, TM

from service.dicom_out.outcome import Outcome

DISCLAIMER = "Research use only; not a medical device. Computed by Keyslice, not reviewed by a physician."
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "urn:keyslice:dicom-out")
LAYOUT = 1  # of the documents; counted up when what they say changes, and their UIDs with it
SCHEME = "99KEYSLICE"  # private coding schemes begin with 99 (PS3.16 8.2)


def uid(outcome: Outcome, kind: str, *parts: str) -> UID:
    """The UID of a part of the document of this kind: the same for the same head and bags (PS3.5 B.2)."""
    made_from = [LAYOUT, version("keyslice"), outcome.head_id, outcome.head_version, outcome.encoder_id, outcome.bags]
    name = json.dumps([kind, *parts, *made_from, outcome.made_at.isoformat()])
    return UID(f"2.25.{uuid.uuid5(NAMESPACE, name).int}")


def described(outcome: Outcome, kind: str, series_number: int) -> dict[str, Any]:
    """What highdicom's documents are told of series, equipment and time."""
    return {
        "series_instance_uid": uid(outcome, kind, "series"),
        "series_number": series_number,
        "series_description": f"Keyslice {kind}: research use only",
        "sop_instance_uid": uid(outcome, kind, "instance"),
        "instance_number": 1,
        "manufacturer": "Keyslice",
        "manufacturer_model_name": "Keyslice",
        "software_versions": version("keyslice"),
        "content_date": DA(outcome.made_at.strftime("%Y%m%d")),
        "content_time": TM(outcome.made_at.strftime("%H%M%S")),
    }


def observer() -> ObserverContext:
    """Keyslice as the device that observed (PS3.16 TID 1004)."""
    device = UID(f"2.25.{uuid.uuid5(NAMESPACE, 'device').int}")
    attributes = DeviceObserverIdentifyingAttributes(uid=device, name="Keyslice", manufacturer_name="Keyslice")
    return ObserverContext(codes.DCM.Device, attributes)


def private_scheme() -> CodingSchemeIdentificationItem:
    """Says whose the private codes are (PS3.3 C.12.1.1.7.1 asks for it)."""
    return CodingSchemeIdentificationItem(SCHEME, name="Keyslice", responsible_organization="Keyslice")


def private(value: str, meaning: str) -> CodedConcept:
    return CodedConcept(value, SCHEME, meaning)


def finished(document: Dataset, subject: Dataset) -> Dataset:
    """The document with whom and which study it is of, and with nothing in it that another run would write otherwise.

    highdicom gets the images without these elements: it warns of odd names by quoting them.
    """
    document.update(subject)
    document.InstanceCreationDate, document.InstanceCreationTime = document.ContentDate, document.ContentTime
    for library in document.get("ContributingEquipmentSequence", []):  # highdicom names itself there
        library.ContributionDateTime = f"{document.ContentDate}{document.ContentTime}"
    return document


def to_bytes(document: Dataset) -> bytes:
    """The document as a DICOM file (PS3.10), explicit little endian."""
    file = io.BytesIO()
    document.save_as(file, enforce_file_format=True)
    return file.getvalue()
