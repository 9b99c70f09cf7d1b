"""Who a patient is, as a keyed hash: identifiers, UIDs and dates of what arrives, before anything of it is kept.

The rules are the Basic Application Level Confidentiality Profile with the option Retain Longitudinal Temporal
Information with Modified Dates (PS3.15 E.1, E.3.6, table E.1-1, as dicom-anonymizer has it). Where the table says
nothing we are stricter: private elements, names of persons and elements of unknown VR go too.
"""

import hmac
import re
from collections.abc import Callable
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Literal

from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector
from dicomanonymizer.simpledicomanonymizer import replace_element
from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement, RawDataElement, empty_value_for_VR
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.multival import MultiValue
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag

from models.ct.header import read_whole
from models.ct.pixels import syntax_of
from models.ct.reasons import Reason
from models.ct.screening import SetAside
from service.settings import Settings

EDITION = "dicomfields_2026c"
LONGEST_DAYS = 3650  # that dates are shifted back by
OF_DICOM = "1.2.840.10008."  # UIDs of the standard's own, which name nobody
PATIENT = 0x0010  # the group whose dates are the patient's own
REMOVED = "Keyslice: PS3.15 Basic Profile, dates shifted"
# PS3.16 CID 7050.
METHODS = {
    "113100": "Basic Application Confidentiality Profile",
    "113107": "Retain Longitudinal Temporal Information Modified Dates Option",
}

Action = Literal["dummy", "empty", "remove", "uid"]
ACTIONS: dict[str, Action] = {
    "D_TAGS": "dummy",
    "Z_TAGS": "empty",
    "X_TAGS": "remove",
    "U_TAGS": "uid",
    "Z_D_TAGS": "dummy",
    "X_Z_TAGS": "empty",
    "X_D_TAGS": "dummy",
    "X_Z_D_TAGS": "dummy",
    "X_Z_U_STAR_TAGS": "uid",
}


class Pseudonyms:
    """The same original has the same pseudonym as long as the key is the same; without the key none leads back."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @staticmethod
    def of(settings: Settings) -> "Pseudonyms | None":
        key = settings.pseudonym_key
        return Pseudonyms(key.get_secret_value().encode()) if key else None

    @property
    def fingerprint(self) -> str:
        """Of the key, to tell another one by."""
        return self._hash("key", "").hex()[:32]

    def patient(self, patient_id: str) -> str:
        """24 hexadecimal digits; spaces around an id are not part of it (PS3.5 6.2)."""
        return self._hash("patient", patient_id.strip()).hex()[:24]

    def uid(self, uid: str) -> str:
        """A UID of 128 bits (PS3.5 B.2); the standard's own stay."""
        return uid if uid.startswith(OF_DICOM) else f"2.25.{int.from_bytes(self._hash('uid', uid)[:16], 'big')}"

    def days(self, patient_id: str) -> int:
        """That every date of the patient is shifted back by, 1 to LONGEST_DAYS."""
        return 1 + int.from_bytes(self._hash("days", patient_id.strip())[:8], "big") % LONGEST_DAYS

    def rewrite(self, path: Path) -> SetAside | None:
        """Put the file's pseudonymous self in its place, its pixels bit by bit the same; or why there is none."""
        try:
            dataset = read_whole(path)
            if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES":
                return SetAside(Reason.BURNED_IN, "its pixels may name the patient")
            self.clean(dataset)
            dcmwrite(path, dataset, enforce_file_format=True)
        except OSError:
            raise  # a disk that fails is no fault of the file
        except Exception as error:  # pydicom raises anything of broken values, and would quote them
            return SetAside(Reason.NOT_PSEUDONYMISED, f"{type(error).__name__} while identifiers were removed")
        return None

    def clean(self, dataset: FileDataset) -> None:
        """In place, file meta information and preamble too."""
        patient_id = str(dataset.get("PatientID") or "").strip()
        days = self.days(patient_id or str(dataset.get("StudyInstanceUID")))
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = syntax_of(dataset)
        self._clean(dataset, days)
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
        dataset.file_meta, dataset.preamble = meta, bytes(128)
        if patient_id:
            dataset.PatientID = dataset.PatientName = self.patient(patient_id)
        dataset.PatientIdentityRemoved, dataset.DeidentificationMethod = "YES", REMOVED
        dataset.DeidentificationMethodCodeSequence = [_code(*each) for each in METHODS.items()]
        dataset.LongitudinalTemporalInformationModified = "MODIFIED"

    def _clean(self, dataset: Dataset, days: int) -> None:
        for tag in list(dataset.keys()):
            vr, action = _vr(dataset.get_item(tag)), _action(tag)
            kept = not action and vr not in ("PN", "UN")
            if tag.is_private:
                del dataset[tag]
            elif vr in ("DA", "DT", "TM") and tag.group != PATIENT:
                if vr != "TM":  # whole days leave the time of day as it was
                    _each_value(dataset[tag], lambda value: _earlier(value, days))
            elif vr == "SQ" and action in (None, "uid"):
                for item in dataset[tag].value:
                    self._clean(item, days)
            elif action == "remove" or not (action or kept):
                del dataset[tag]
            elif action == "empty" or (action and vr == "SQ"):
                dataset[tag] = DataElement(tag, vr, Sequence() if vr == "SQ" else empty_value_for_VR(vr))
            elif action and vr == "UI":
                _each_value(dataset[tag], self.uid)
            elif action:
                replace_element(dataset[tag])

    def _hash(self, kind: str, original: str) -> bytes:
        return hmac.digest(self._key, f"{kind}\0{original}".encode(), "sha256")


@cache
def _table() -> tuple[dict[tuple[int, int], Action], list[tuple[tuple[int, ...], Action]]]:
    """What table E.1-1 does with a tag; and with the groups that repeat, by their masks."""
    database = dicom_anonymization_database_selector(EDITION)
    listed = [(tag, action) for name, action in ACTIONS.items() for tag in database[name]]
    return {tag: action for tag, action in listed if len(tag) == 2}, [each for each in listed if len(each[0]) == 4]


def _action(tag: BaseTag) -> Action | None:
    by_tag, by_mask = _table()
    for (group, element, group_mask, element_mask), action in by_mask:
        if (tag.group & group_mask, tag.element & element_mask) == (group, element):
            return action
    return by_tag.get((tag.group, tag.element))


def _vr(element: DataElement | RawDataElement) -> str:
    """Where the file says UN, what the dictionary knows better (PS3.5 6.2.2)."""
    if element.VR not in (None, "UN"):
        return str(element.VR)
    try:
        return dictionary_VR(element.tag)
    except KeyError:
        return "UN"


def _each_value(element: DataElement, change: Callable[[str], str]) -> None:
    value = element.value
    if value not in (None, ""):
        many = isinstance(value, MultiValue)
        element.value = [change(str(each)) for each in value] if many else change(str(value))


def _earlier(value: str, days: int) -> str:
    """A DA or DT by so many days; what is no whole date is emptied."""
    found = re.fullmatch(r"(\d{4})\.?(\d{2})\.?(\d{2})([\d.+-]*)", value.strip())
    if not found:
        return ""
    year, month, day, rest = found.groups()
    try:
        return f"{date(int(year), int(month), int(day)) - timedelta(days=days):%Y%m%d}{rest}"
    except (ValueError, OverflowError):
        return ""


def _code(value: str, meaning: str) -> Dataset:
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = value, "DCM", meaning
    return code
