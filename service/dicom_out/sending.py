"""Documents on their way to a peer: by C-STORE or by STOW-RS."""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import httpx
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE

from service.dicom_out.document import to_bytes
from service.dicom_out.peers import CStore, Peer, Stow

SECONDS = 30.0  # without a sign of the peer, after which it counts as away
LONGEST_ANSWER = 2**20  # bytes of a store response that are read
CONTENT_TYPE = "application/dicom"
REFUSED = 0x0110  # processing failure (PS3.7 C): where a peer refused without saying why

# Tags of the store response (PS3.18 10.5.3.2), as DICOM JSON names them.
FAILED_SEQUENCE, SOP_INSTANCE, FAILURE_REASON = "00081198", "00081155", "00081197"


class PeerAway(Exception):
    """The peer did not answer, or not as its protocol asks. The message holds nothing of what was sent or answered."""


@dataclass(frozen=True)
class Stored:
    """What the peer said of one document."""

    sop_instance_uid: str
    status: int  # DICOM status (PS3.7 C, PS3.4 B.2.3): 0 stored, 0xBxxx stored with a warning, else refused

    @property
    def stored(self) -> bool:
        return self.status == 0 or self.status >> 12 == 0xB


def send(documents: Sequence[Dataset], peer: Peer, calling_ae: str) -> list[Stored]:
    """Hand the documents to the peer, and answer what it said of each. Raises PeerAway."""
    if isinstance(peer, CStore):
        return _c_store(documents, peer, calling_ae)
    return _stow(documents, peer)


def _c_store(documents: Sequence[Dataset], peer: CStore, calling_ae: str) -> list[Stored]:
    entity = AE(ae_title=calling_ae)
    entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = entity.connection_timeout = SECONDS
    for sop_class in {document.SOPClassUID for document in documents}:
        entity.add_requested_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    association = entity.associate(peer.host, peer.port, ae_title=peer.called_ae)
    if not association.is_established:
        reason = "refused the association" if association.is_rejected else "did not take the association up"
        raise PeerAway(f"{peer} {reason}")
    try:
        return [_stored_by(association, document, peer) for document in documents]
    finally:
        association.release()


def _stored_by(association: Any, document: Dataset, peer: CStore) -> Stored:
    try:
        answer = association.send_c_store(document)
    except ValueError:  # no presentation context of this SOP class was accepted
        return Stored(str(document.SOPInstanceUID), 0x0122)  # SOP class not supported (PS3.7 C.4.2)
    except RuntimeError as error:  # the association broke
        raise PeerAway(f"{peer} ended the association") from error
    if "Status" not in answer:
        raise PeerAway(f"{peer} ended the association without an answer")
    return Stored(str(document.SOPInstanceUID), int(answer.Status))


def _stow(documents: Sequence[Dataset], peer: Stow) -> list[Stored]:
    boundary = uuid.uuid4().hex
    headers = {
        "Content-Type": f'multipart/related; type="{CONTENT_TYPE}"; boundary={boundary}',
        "Accept": "application/dicom+json",
    }
    # No redirects and nothing of the environment: patients' documents go where the setting says, or nowhere.
    with httpx.Client(timeout=SECONDS, follow_redirects=False, trust_env=False) as client:
        try:
            body = b"".join(_parts(documents, boundary))
            with client.stream("POST", peer.url, content=body, headers=headers) as answer:
                content = _beginning(answer.iter_bytes())
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise PeerAway(f"{peer} did not answer: {type(error).__name__}") from error
    return _said(answer.status_code, content, documents, peer)


def _parts(documents: Sequence[Dataset], boundary: str) -> Iterable[bytes]:
    """multipart/related of PS3.10 files (PS3.18 8.6.1.2)."""
    for document in documents:
        yield f"--{boundary}\r\nContent-Type: {CONTENT_TYPE}\r\n\r\n".encode()
        yield to_bytes(document)
        yield b"\r\n"
    yield f"--{boundary}--\r\n".encode()


def _beginning(chunks: Iterable[bytes]) -> bytes:
    """What comes, but no more than LONGEST_ANSWER."""
    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > LONGEST_ANSWER:
            break
    return bytes(content)


def _said(status: int, content: bytes, documents: Sequence[Dataset], peer: Stow) -> list[Stored]:
    """200: stored, 409: none, 202: some, and the body says which (PS3.18 table 10.5.3-1). Some say so with 200 too."""
    if status not in (200, 202, 409):
        raise PeerAway(f"{peer} answered {status}, expected 200, 202 or 409")
    failed = _failed(content)
    if failed is None and status == 202:
        raise PeerAway(f"{peer} answered 202 and no store response in DICOM JSON, expected one that says what failed")
    unnamed = REFUSED if status == 409 else 0
    uids = [str(document.SOPInstanceUID) for document in documents]
    return [Stored(each, (failed or {}).get(each, unnamed)) for each in uids]


def _failed(content: bytes) -> dict[str, int] | None:
    """SOP Instance UID -> failure reason, of a store response in DICOM JSON; None for anything else."""
    try:
        answer = httpx.Response(200, content=content).json()
        items = _values(answer[0] if isinstance(answer, list) else answer, FAILED_SEQUENCE)
        return {
            str(_values(item, SOP_INSTANCE)[0]): int((_values(item, FAILURE_REASON) or [REFUSED])[0]) for item in items
        }
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def _values(item: Mapping[str, Any], tag: str) -> list[Any]:
    return cast(list[Any], item.get(tag, {}).get("Value", []))
