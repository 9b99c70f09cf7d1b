"""A Key Object Selection document (PS3.3 A.35.4, PS3.16 TID 2010) of the slices that made a head say what it says."""

from collections.abc import Sequence

from highdicom.ko import KeyObjectSelection, KeyObjectSelectionDocument
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from service.dicom_out.document import DISCLAIMER, described, finished, observer
from service.dicom_out.outcome import Outcome
from service.dicom_out.source import image, subject

KIND = "key objects"
SERIES_NUMBER = 9001


def key_objects(outcome: Outcome, headers: Sequence[Dataset]) -> Dataset:
    """The document (title 113000, DCM, "Of Interest") that points at outcome.top, whose headers these are, in order."""
    images = [image(header) for header in headers]
    different = {each.SOPInstanceUID: each for each in images}
    selection = KeyObjectSelection(
        document_title=codes.DCM.OfInterest,
        referenced_objects=images,
        observer_device_context=observer(),
        description=_description(outcome),
    )
    pointers = [item for item in selection[0].ContentSequence if item.ValueType == "IMAGE"]
    for pointer, each in zip(pointers, outcome.top, strict=True):
        if each.frame is not None:  # highdicom names whole images only
            pointer.ReferencedSOPSequence[0].ReferencedFrameNumber = each.frame
    document = KeyObjectSelectionDocument([*different.values()], selection, **described(outcome, KIND, SERIES_NUMBER))
    return finished(document, subject(headers[0]))


def _description(outcome: Outcome) -> str:
    return (
        f"The {len(outcome.top)} slices with the highest attention of head {outcome.head_id} "
        f"version {outcome.head_version} on {outcome.encoder_id}, the highest first. {DISCLAIMER}"
    )
