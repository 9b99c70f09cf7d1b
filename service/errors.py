"""What can go wrong, as one tree. It knows nothing of HTTP; service/app.py maps it to statuses.

KeysliceError
├── NotFound
│   ├── SeriesNotFound, PatientNotFound, StudyNotFound, SliceNotFound
│   ├── InstanceNotFound, FrameNotFound, BulkDataNotFound
│   ├── EncoderNotFound, WindowNotFound, LabelNotFound
│   ├── HeadNotFound, JobNotFound, ExportNotFound, PredictionNotFound, ErasureNotFound
│   ├── KeyNotFound
│   └── EmptyCohort
├── BadRequest
│   ├── BadUpload            EmptyUpload, BadArchive, NothingUsable, UploadTooLarge
│   ├── BadLabels
│   ├── BadExport
│   ├── BadQuery
│   └── BadDicomWeb          UnsupportedMedia, NotAcceptable
├── Conflict
│   ├── NotEmbeddedYet, NotIndexedYet, BagGone, NotFailed
│   ├── HeadNotReady, HeadsDiffer
│   ├── OtherEncoder
│   ├── BeingErased
│   ├── Damaged
│   └── WeightsNotHere
├── Unauthenticated, ScopeMissing, BeyondKey
├── TooManyRequests         QueueFull
├── LicenceNotAccepted
├── PathNotAllowed
├── PeerNotAllowed, PeerFailed
├── SourceFailed            SourceRefused, CredentialsRefused, SourceNotFound, SourceAway
├── NoRoom
├── BrokerDown, StorageUnreachable
├── ErasureUnfinished
├── WorkersBusy
└── ServiceAway, JobFailed      of a client alone
"""

import re
from typing import Any


class KeysliceError(Exception):
    """Base of all. The message says what was found and expected, and never names a patient."""

    def __init__(self, message: str, **found: Any) -> None:
        super().__init__(message)
        self.found = found  # machine-readable extras of the answer


class NotFound(KeysliceError):
    """Asked for something that is not there."""


class SeriesNotFound(NotFound):
    """No series of this UID."""


class PatientNotFound(NotFound):
    """No patient of this id."""


class StudyNotFound(NotFound):
    """No study of this UID."""


class SliceNotFound(NotFound):
    """The series has no slice of this number."""


class InstanceNotFound(NotFound):
    """The series has no instance of this UID."""


class FrameNotFound(NotFound):
    """The instance has no frame of this number."""


class BulkDataNotFound(NotFound):
    """The instance has no bulk data at this place."""


class EncoderNotFound(NotFound):
    """No encoder of this name."""


class WindowNotFound(NotFound):
    """No window of this name."""


class LabelNotFound(NotFound):
    """The head has no label of this name."""


class HeadNotFound(NotFound):
    """No head of this id or name."""


class JobNotFound(NotFound):
    """No job of this id."""


class ExportNotFound(NotFound):
    """No export of this id."""


class PredictionNotFound(NotFound):
    """No prediction of this id was given."""


class ErasureNotFound(NotFound):
    """No erasure of this id."""


class KeyNotFound(NotFound):
    """No API key of this id."""


class EmptyCohort(NotFound):
    """No embedded series meets the filter."""


class BadRequest(KeysliceError):
    """What was sent cannot be used."""


class BadUpload(BadRequest):
    """The upload is not what it should be; nothing of it was kept."""


class EmptyUpload(BadUpload):
    """There was no file in it."""


class BadArchive(BadUpload):
    """An archive is broken, leads out of its directory, or expands too far."""


class NothingUsable(BadUpload):
    """Not one file was an axial CT slice."""


class UploadTooLarge(BadUpload):
    """More bytes or files than the limits allow."""


class BadLabels(BadRequest):
    """The labels table cannot train a head."""


class BadExport(BadRequest):
    """What was named as an export is none that can be read."""


class BadQuery(BadRequest):
    """The search cannot be answered as asked."""


class BadDicomWeb(BadRequest):
    """The DICOMweb request is not what PS3.18 says."""


class UnsupportedMedia(BadDicomWeb):
    """A body of another media type than expected."""


class NotAcceptable(BadDicomWeb):
    """There is no representation that the caller accepts."""


class Conflict(KeysliceError):
    """Right in itself, but not in the present state."""


class NotEmbeddedYet(Conflict):
    """The series is still on its way."""


class NotFailed(Conflict):
    """There is nothing to try again."""


class NotIndexedYet(Conflict):
    """Nothing is embedded by this encoder yet."""


class BagGone(Conflict):
    """The bag was replaced by one of more slices while it was asked for."""


class HeadNotReady(Conflict):
    """The head is still being trained, or its training failed."""


class HeadsDiffer(Conflict):
    """The heads were not measured on the same patients and labels."""


class OtherEncoder(Conflict):
    """Embeddings of different encoders do not mix."""


class BeingErased(Conflict):
    """The series is just being erased; what comes afterwards is a new series."""


class Damaged(Conflict):
    """What is stored is no longer what was stored."""


class WeightsNotHere(Conflict):
    """The encoder's weights are not on this machine."""


class Unauthenticated(KeysliceError):
    """No usable API key came with the request."""


class ProviderAway(KeysliceError):
    """The identity provider, whose keys are needed to know the caller, does not answer."""


class ScopeMissing(KeysliceError):
    """The API key does not have the scope that this needs."""


class BeyondKey(KeysliceError):
    """The API key sees only series with its tags, and this is about more than one of them."""


class TooManyRequests(KeysliceError):
    """More requests than the limit allows."""


class QueueFull(TooManyRequests):
    """As much of one kind of work waits as may."""


class LicenceNotAccepted(KeysliceError):
    """The encoder's licence forbids commercial use, and the service was not told that there is none."""


class PathNotAllowed(KeysliceError):
    """No setting allows callers to name this path of the service's machine."""


class PeerNotAllowed(KeysliceError):
    """The setting does not name this DICOM peer."""


class PeerFailed(KeysliceError):
    """The DICOM peer did not take what was sent."""


class SourceFailed(KeysliceError):
    """What an export is read from did not give what was asked."""


class SourceRefused(SourceFailed):
    """It does not let us have this."""


class CredentialsRefused(SourceFailed):
    """It does not let us have anything: credentials are missing, wrong or expired."""


class SourceNotFound(SourceFailed):
    """It has no such thing."""


class SourceAway(SourceFailed):
    """It does not answer, or says that it may later; tried several times."""


class NoRoom(KeysliceError):
    """The disk is too full to take this in."""


class BrokerDown(KeysliceError):
    """The message broker does not answer."""


class StorageUnreachable(KeysliceError, OSError):
    """The object store does not answer, or refuses."""


class ErasureUnfinished(KeysliceError):
    """Something still holds what is to be erased. It is out of sight already, and the service goes on by itself."""


class WorkersBusy(KeysliceError):
    """No worker has answered in time; the same request may find the answer later."""


class ServiceAway(KeysliceError):
    """No Keyslice service answers, or it broke off while it did."""


class JobFailed(KeysliceError):
    """The work that was waited for failed, or was cancelled."""


def kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()


def kinds() -> dict[str, type[KeysliceError]]:
    """Every class of the tree by its name outside: SeriesNotFound is `series-not-found`. These names do not change."""
    found: dict[str, type[KeysliceError]] = {"invalid-request": BadRequest}
    open_ends = [KeysliceError]
    while open_ends:
        error = open_ends.pop()
        found[kebab(error.__name__)] = error
        open_ends += error.__subclasses__()
    return found
