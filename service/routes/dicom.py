"""What a head says, as DICOM objects: to fetch, or sent to a peer."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from pydicom.dataset import Dataset

from models.ct.header import NotDicom, read_header
from service.deps import HeadsDep, SettingsDep, ShownDep, StoresDep, needs
from service.dicom_out.document import to_bytes
from service.dicom_out.key_objects import key_objects
from service.dicom_out.outcome import Outcome, outcome_of
from service.dicom_out.peers import BadPeer, CStore, Peer, parse_peer, parse_peers
from service.dicom_out.report import report
from service.dicom_out.sending import PeerAway, send
from service.dicom_out.source import SOURCE_ELEMENTS
from service.errors import PeerFailed, PeerNotAllowed, SliceNotFound, StorageUnreachable
from service.explanations import explain_patient, explain_series
from service.schemas.base import Text
from service.schemas.dicom import DicomKind, DicomOut, DicomOutDone, DicomPeer, DicomSent
from service.settings import Settings
from service.storage.stores import Stores

MEDIA_TYPE = "application/dicom"
OBJECT: dict[int | str, dict[str, Any]] = {
    200: {"content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}
}

router = APIRouter(prefix="/v1", tags=["dicom out"])


@router.get("/series/{series_uid}/key-objects", response_class=Response, responses=OBJECT, dependencies=[needs("read")])
def get_key_objects(series_uid: Text, head: Annotated[Text, Query()], stores: StoresDep, heads: HeadsDep) -> Response:
    """A Key Object Selection document of the top slices."""
    outcome = outcome_of(explain_series(stores, heads, head, series_uid), stores)
    return _answer(_document("key_objects", outcome, stores))


@router.get("/series/{series_uid}/report", response_class=Response, responses=OBJECT, dependencies=[needs("read")])
def get_report(series_uid: Text, head: Annotated[Text, Query()], stores: StoresDep, heads: HeadsDep) -> Response:
    """A Structured Report (TID 1500) of the predictions for this series."""
    outcome = outcome_of(explain_series(stores, heads, head, series_uid), stores)
    return _answer(_document("report", outcome, stores))


@router.get(
    "/patients/{patient_id:path}/report", response_class=Response, responses=OBJECT, dependencies=[needs("read")]
)
def get_patient_report(
    patient_id: Text,
    head: Annotated[Text, Query()],
    stores: StoresDep,
    heads: HeadsDep,
    shown: ShownDep,
    series_uid: Annotated[Text | None, Query()] = None,
    study_uid: Annotated[Text | None, Query()] = None,
) -> Response:
    """The same from all of the patient's accepted series together; it is of the study that is the latest."""
    explained = explain_patient(stores, heads, head, patient_id, series_uid=series_uid, study_uid=study_uid)
    shown.series(explained.bag.contents)
    return _answer(_document("report", outcome_of(explained, stores), stores))


@router.post("/series/{series_uid}/dicom-out", dependencies=[needs("write")])
def post_dicom_out(
    series_uid: Text,
    order: DicomOut,
    stores: StoresDep,
    heads: HeadsDep,
    settings: SettingsDep,
    shown: ShownDep,
) -> DicomOutDone:
    """Send documents to a peer. Sent again they are the same objects, by UID and content."""
    peer = _allowed(order.to, settings)
    outcome = outcome_of(explain_series(stores, heads, order.head, series_uid), stores)
    shown.about(peer=str(peer), head=outcome.head_id)
    documents = {kind: _document(kind, outcome, stores) for kind in order.kinds}
    try:
        stored = send([*documents.values()], peer, order.to.c_store.calling_ae if order.to.c_store else "")
    except PeerAway as error:
        raise PeerFailed(str(error)) from error
    sent = [
        DicomSent(
            kind=kind,
            sop_class_uid=document.SOPClassUID,
            sop_instance_uid=document.SOPInstanceUID,
            status=each.status,
        )
        for (kind, document), each in zip(documents.items(), stored, strict=True)
    ]
    if not all(each.stored for each in stored):
        raise PeerFailed(f"{peer} refused some of the objects", sent=[each.model_dump() for each in sent])
    return DicomOutDone(series_uid=series_uid, head_id=order.head, sent=sent)


def _document(kind: DicomKind, outcome: Outcome, stores: Stores) -> Dataset:
    if kind == "report":
        headers = [_header(stores, *each) for each in outcome.instances]
        return report(outcome, sorted(headers, key=_studied, reverse=True))
    if not outcome.top:
        raise SliceNotFound(f"{outcome.encoder_id} embeds volumes as one, so no slice of them has attention of its own")
    return key_objects(outcome, [_header(stores, each.series_uid, each.sop_uid) for each in outcome.top])


def _header(stores: Stores, series_uid: str, sop_uid: str) -> Dataset:
    try:
        with stores.archive.reading(series_uid, [sop_uid]) as (path,):
            return read_header(path, also=SOURCE_ELEMENTS)
    except StorageUnreachable:
        raise
    except (OSError, NotDicom) as error:
        raise SliceNotFound(f"instance {sop_uid} of series {series_uid} can no longer be read") from error


def _studied(header: Dataset) -> tuple[str, str, str]:
    """When the study was, for the latest to be the report's; sorting keeps the slices' order within it."""
    return str(header.get("StudyDate") or ""), str(header.get("StudyTime") or ""), str(header.StudyInstanceUID)


def _allowed(to: DicomPeer, settings: Settings) -> Peer:
    """The peer, where the setting names it: a caller cannot make this service talk to anything else."""
    try:
        if to.c_store is not None:
            asked: Peer = CStore(to.c_store.host.lower(), to.c_store.port, to.c_store.called_ae)
        else:
            asked = parse_peer(to.stow or "")
    except BadPeer as error:
        raise PeerNotAllowed(str(error)) from error
    peers = parse_peers(settings.dicom_peers)
    if asked not in peers:
        found = f"KEYSLICE_DICOM_PEERS names {len(peers)} peers" if peers else "KEYSLICE_DICOM_PEERS is unset"
        raise PeerNotAllowed(f"nothing is sent to a peer that the setting does not name, and {found}, not this one")
    return asked


def _answer(document: Dataset) -> Response:
    name = {"Content-Disposition": f'attachment; filename="{document.SOPInstanceUID}.dcm"'}
    return Response(to_bytes(document), media_type=MEDIA_TYPE, headers=name)
