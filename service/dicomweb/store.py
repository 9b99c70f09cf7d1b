"""STOW-RS: parts of a request to archived slices, and what the sender is told of each (PS3.18 10.5)."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from python_multipart.multipart import parse_options_header

from models.ct.header import read_header
from models.ct.reasons import UID, Reason
from service.dicomweb.addresses import Addresses
from service.dicomweb.media import DICOM, RELATED
from service.disk import Room
from service.errors import BadDicomWeb, BadUpload, BeingErased, UnsupportedMedia, UploadTooLarge
from service.intake import collect
from service.pseudonyms import Pseudonyms
from service.settings import Settings
from service.storage.stores import Stores
from service.uploads import StagedFile, receive_parts

# Failure Reason (PS3.18 table I.2-2).
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
SYNTAX_NOT_SUPPORTED = 0xC122
PROCESSING_FAILURE = 0x0110
CLASS_NOT_SUPPORTED = 0x0122

FAILURES: dict[Reason, int] = {
    Reason.NOT_DICOM: CANNOT_UNDERSTAND,
    Reason.UNREADABLE_HEADER: CANNOT_UNDERSTAND,
    Reason.INVALID_UID: CANNOT_UNDERSTAND,
    Reason.NOT_CT: CLASS_NOT_SUPPORTED,
    Reason.SECONDARY_CAPTURE: CLASS_NOT_SUPPORTED,
    Reason.MULTIFRAME: CLASS_NOT_SUPPORTED,
    Reason.UNSUPPORTED_TRANSFER_SYNTAX: SYNTAX_NOT_SUPPORTED,
    Reason.LOCALIZER: DOES_NOT_MATCH,
    Reason.NOT_HU: DOES_NOT_MATCH,
    Reason.NO_PIXELS: DOES_NOT_MATCH,
    Reason.NOT_GRAYSCALE: DOES_NOT_MATCH,
    Reason.NO_POSITION: DOES_NOT_MATCH,
    Reason.NOT_AXIAL: DOES_NOT_MATCH,
    Reason.BAD_RESCALE: DOES_NOT_MATCH,
    Reason.SERIES_OF_ANOTHER_PATIENT: DOES_NOT_MATCH,
}
OTHER_STUDY = "other_study"
ERASING = "being_erased"

LONGEST_COMMENT = 64  # characters of LO (PS3.5 6.2)


@dataclass(frozen=True)
class Failure:
    reason: int  # PS3.18 table I.2-2
    comment: str  # a word of docs/dicom.md and what was found; never a patient's data


@dataclass(frozen=True)
class Instance:
    """One part of the request as its header names it; a UID that is none is empty."""

    file: StagedFile
    sop_class: str
    sop_uid: str
    series_uid: str
    study_uid: str
    stored_as: tuple[str, str, str] = ("", "", "")  # study, series and instance here


@dataclass(frozen=True)
class Outcome:
    """Every part in the order it came, with why it was not stored."""

    instances: Sequence[tuple[Instance, Failure | None]]

    @property
    def status(self) -> int:
        """200 for all stored, 202 for some, 409 for none (PS3.18 table 10.5.3-1)."""
        failed = sum(failure is not None for _, failure in self.instances)
        return 200 if not failed else 409 if failed == len(self.instances) else 202


async def receive_instances(
    stream: AsyncIterator[bytes], content_type: str, folder: Path, room: Room, *, max_files: int
) -> list[StagedFile]:
    """The parts of a multipart/related body, below folder.

    Raises UnsupportedMedia, BadDicomWeb, UploadTooLarge or NoRoom.
    """
    kind, options = parse_options_header(content_type)
    part = options.get(b"type", DICOM.encode()).lower()
    if kind != RELATED.encode() or part != DICOM.encode():
        found = f"{kind.decode('latin-1') or 'missing'} of {part.decode('latin-1')}"
        raise UnsupportedMedia(f'Content-Type is {found}, expected {RELATED}; type="{DICOM}"')
    if not options.get(b"boundary"):
        raise BadDicomWeb("Content-Type names no boundary, expected one")
    try:
        files = await receive_parts(stream, options[b"boundary"], folder, _checked_part, room, max_files=max_files)
    except UploadTooLarge:
        raise
    except BadUpload as error:
        raise BadDicomWeb(str(error)) from error
    if not files:
        raise BadDicomWeb("the body has no part, expected one per instance")
    return files


def store(
    files: Sequence[StagedFile],
    study_uid: str | None,
    encoder_id: str,
    stores: Stores,
    settings: Settings,
    sender: str = "",
) -> Outcome:
    """Archive the axial CT slices among the parts; those of another study than the path's are refused.

    What the outcome calls stored is on disk and in the catalog, new or not. On a full disk some may be in the archive
    when OSError comes; sent again, they count as stored.
    """
    instances = [_instance(file, stores.pseudonyms) for file in files]
    failures: dict[str, Failure] = {}
    for each in instances:
        if study_uid is not None and each.study_uid and each.study_uid != study_uid:
            failures[each.file.name] = Failure(DOES_NOT_MATCH, f"{OTHER_STUDY}: not of the study in the path")
            each.file.path.unlink()
    wanted = [each.file for each in instances if each.file.name not in failures]
    failures |= _collected(wanted, encoder_id, stores, settings, sender)
    return Outcome([(each, failures.get(each.file.name)) for each in instances])


def store_response(outcome: Outcome, addresses: Addresses) -> dict[str, Any]:
    """The Store Instances Response Module (PS3.18 table I.2-1) in the DICOM JSON model."""
    stored = [each for each, failure in outcome.instances if failure is None]
    failed = [(each, failure) for each, failure in outcome.instances if failure and each.sop_uid]
    others = [failure for each, failure in outcome.instances if failure and not each.sop_uid]
    answer: dict[str, Any] = {}
    if len(studies := {each.stored_as[0] for each in stored}) == 1:
        answer["00081190"] = {"vr": "UR", "Value": [addresses.study(studies.pop())]}
    if failed:
        items = [_reference(each) | _why(failure) for each, failure in failed]
        answer["00081198"] = {"vr": "SQ", "Value": items}
    if stored:
        answer["00081199"] = {"vr": "SQ", "Value": [_reference(each) | _where(each, addresses) for each in stored]}
    if others:
        answer["0008119A"] = {"vr": "SQ", "Value": [_why(failure) for failure in others]}
    return answer


def _checked_part(headers: Mapping[bytes, bytes]) -> str:
    kind, _ = parse_options_header(headers.get(b"content-type", DICOM.encode()))
    if kind != DICOM.encode():
        raise UnsupportedMedia(f"a part is {kind.decode('latin-1')}, expected {DICOM}")
    return ""


def _instance(file: StagedFile, pseudonyms: Pseudonyms | None) -> Instance:
    try:
        header = read_header(file.path)
        found = [
            str(header.get(keyword) or "")
            for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID")
        ]
    except Exception:  # no DICOM, or a broken value, which raises anything when it is read; screening names it
        found = []
    names = [each if UID.fullmatch(each) else "" for each in found] or [""] * 4
    sop_class, sop_uid, series_uid, study_uid = names
    called = pseudonyms.uid if pseudonyms else str
    stored_as = called(study_uid), called(series_uid), called(sop_uid)
    return Instance(file, sop_class, sop_uid, series_uid, study_uid, stored_as)


def _collected(
    files: Sequence[StagedFile], encoder_id: str, stores: Stores, settings: Settings, sender: str
) -> dict[str, Failure]:
    """Hand the files to intake; answers those that were not stored."""
    try:
        intake = collect(files, encoder_id, stores, settings, sender)
    except BeingErased as error:
        return {file.name: Failure(PROCESSING_FAILURE, f"{ERASING}: {error}") for file in files}
    aside = [*intake.set_aside, *(each for series in intake.series for each in series.set_aside)]
    return {
        each.file: Failure(FAILURES.get(each.reason, PROCESSING_FAILURE), f"{each.reason}: {each.detail}")
        for each in aside
    }


def _reference(instance: Instance) -> dict[str, Any]:
    return {
        "00081150": {"vr": "UI", "Value": [instance.sop_class]} if instance.sop_class else {"vr": "UI"},
        "00081155": {"vr": "UI", "Value": [instance.sop_uid]},
    }


def _where(instance: Instance, addresses: Addresses) -> dict[str, Any]:
    url = addresses.instance(*instance.stored_as)
    return {"00081190": {"vr": "UR", "Value": [url]}}


def _why(failure: Failure) -> dict[str, Any]:
    """FailureReason, and our own word for it as ErrorComment, which PS3.7 C knows and other servers answer too."""
    return {
        "00000902": {"vr": "LO", "Value": [failure.comment[:LONGEST_COMMENT]]},
        "00081197": {"vr": "US", "Value": [failure.reason]},
    }
