"""A Structured Report (PS3.3 A.35.2 Enhanced SR, PS3.16 TID 1500) of what a head says of a patient."""

import hashlib
from collections.abc import Sequence

from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    EnhancedSR,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    RelationshipTypeValues,
    SourceImageForMeasurement,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID

from service.dicom_out.document import DISCLAIMER, described, finished, observer, private, private_scheme, uid
from service.dicom_out.outcome import Outcome, TopImage
from service.dicom_out.source import image, subject

KIND = "report"
SERIES_NUMBER = 9002
DECIMALS = 6  # of what float32 holds: processors differ beyond, and the same request gives the same object
LONGEST_MEANING = 64  # characters of a Code Meaning (PS3.3 table 8.8-1, LO)


def report(outcome: Outcome, headers: Sequence[Dataset]) -> Dataset:
    """The document: a probability per label, the attention of the top slices, head, encoder and disclaimer.

    `headers` are those of outcome.instances; all are named as evidence. The report is of the study of the first.
    """
    images = [image(header) for header in headers]
    classes = {each.SOPInstanceUID: each.SOPClassUID for each in images}
    groups = [_prediction(outcome, label) for label in outcome.probabilities]
    groups += [_attention(outcome, each, classes[each.sop_uid], rank) for rank, each in enumerate(outcome.top, start=1)]
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=observer()),
        procedure_reported=codes.LN.CTUnspecifiedBodyRegion,
        imaging_measurements=groups,
    )
    comment = TextContentItem(codes.DCM.Comment, DISCLAIMER, RelationshipTypeValues.CONTAINS)
    content[0].ContentSequence.append(comment)
    document = EnhancedSR(
        images,
        content[0],
        is_complete=True,
        coding_schemes=[private_scheme()],
        **described(outcome, KIND, SERIES_NUMBER),
    )
    return finished(document, subject(headers[0]))


def label_code(label: str) -> CodedConcept:
    """A private code of the label, which is any text: its value a digest of it, its meaning the beginning."""
    printable = "".join(each if each.isprintable() and each != "\\" else " " for each in label).strip()
    digest = hashlib.sha256(label.encode()).hexdigest()[:12]
    return private(f"L{digest}", printable[:LONGEST_MEANING].strip() or "label")


def _prediction(outcome: Outcome, label: str) -> MeasurementsAndQualitativeEvaluations:
    probability = Measurement(codes.DCM.Probability, round(outcome.probabilities[label], DECIMALS), codes.UCUM.NoUnits)
    meaning = label_code(label)
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid(outcome, KIND, "label", label), f"label {meaning.meaning}"),
        finding_type=meaning,
        algorithm_id=_algorithm(outcome),
        measurements=[probability],
    )


def _attention(outcome: Outcome, top: TopImage, sop_class: UID, rank: int) -> MeasurementsAndQualitativeEvaluations:
    frames = None if top.frame is None else [top.frame]
    part = [top.sop_uid, *map(str, frames or ())]
    share = Measurement(
        private("attention", "Attention of the slice, 1 over all slices"),
        round(top.attention, DECIMALS),
        codes.UCUM.NoUnits,
        referenced_images=[SourceImageForMeasurement(sop_class, top.sop_uid, frames)],
    )
    return MeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(uid(outcome, KIND, "slice", *part), f"top slice {rank}"),
        algorithm_id=_algorithm(outcome),
        measurements=[share],
    )


def _algorithm(outcome: Outcome) -> AlgorithmIdentification:
    """Head and encoder (PS3.16 TID 4019)."""
    return AlgorithmIdentification(
        name=f"Keyslice head {outcome.head_id}",
        version=outcome.head_version,
        parameters=[f"encoder {outcome.encoder_id}", f"windows {', '.join(outcome.windows)}"],
    )
