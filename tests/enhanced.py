"""Enhanced CT files of known HU, frame by frame, which a test may spoil before they are written."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, encapsulate_extended, generate_frames
from pydicom.uid import UID, EnhancedCTImageStorage
from synthetic import IDENTITY, SPACING

from models.ct.phantom import Identity, ct_slice

Change = Callable[[FileDataset], None]


def enhanced_ct(
    hu: NDArray[np.float32],
    z_mm: Sequence[float] | None = None,
    rescale: Sequence[tuple[float, float]] | None = None,
    identity: Identity = IDENTITY,
) -> FileDataset:
    """(frames, rows, columns) HU as one object (PS3.3 A.38.1); each frame may have a slope and intercept of its own."""
    z_mm = [k * SPACING[0] for k in range(len(hu))] if z_mm is None else z_mm
    dataset = ct_slice(hu[0], 0.0, 0, SPACING, identity)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    for keyword in (
        "AcquisitionNumber",
        "ConvolutionKernel",
        "ImageOrientationPatient",
        "PixelSpacing",
        "RescaleIntercept",
        "RescaleSlope",
        "RescaleType",
        "SliceThickness",
    ):
        delattr(dataset, keyword)
    corner = dataset.ImagePositionPatient[:2]
    del dataset.ImagePositionPatient
    dataset.NumberOfFrames = len(hu)
    dataset.SharedFunctionalGroupsSequence = [
        groups(
            PixelMeasuresSequence={"PixelSpacing": list(SPACING[1:]), "SliceThickness": SPACING[0]},
            PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
            CTReconstructionSequence={"ConvolutionKernel": "STANDARD"},
            CTImageFrameTypeSequence={"FrameType": ["ORIGINAL", "PRIMARY", "AXIAL", "NONE"]},
        )
    ]
    scales = [(1.0, -1024.0)] * len(hu) if rescale is None else rescale
    dataset.PerFrameFunctionalGroupsSequence = [
        groups(
            PlanePositionSequence={"ImagePositionPatient": [*corner, z]},
            FrameContentSequence={"FrameAcquisitionNumber": 1},
            PixelValueTransformationSequence={
                "RescaleIntercept": intercept,
                "RescaleSlope": slope,
                "RescaleType": "HU",
            },
        )
        for z, (slope, intercept) in zip(z_mm, scales, strict=True)
    ]
    stored = [(each - intercept) / slope for each, (slope, intercept) in zip(hu, scales, strict=True)]
    dataset.PixelData = np.round(stored).astype("<u2").tobytes()
    return dataset


def groups(**sequences: dict[str, object]) -> Dataset:
    """Functional groups of one item each."""
    answer = Dataset()
    for keyword, elements in sequences.items():
        item = Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
        setattr(answer, keyword, [item])
    return answer


def write_enhanced(folder: Path, hu: NDArray[np.float32], change: Change | None = None, **how) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    dataset = enhanced_ct(hu, **how)
    if change:
        change(dataset)
    path = folder / f"{dataset.SOPInstanceUID}.dcm"
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def in_syntax(syntax: UID, offsets: str = "basic", fragments: int = 1) -> Change:
    """A change to a transfer syntax; encapsulated with a "basic", "extended" or "no" table of offsets."""

    def change(dataset: FileDataset) -> None:
        if not syntax.is_compressed or syntax.is_deflated:
            dataset.file_meta.TransferSyntaxUID = syntax
            if not syntax.is_little_endian:
                dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()
            return
        dataset.compress(syntax, generate_instance_uid=False)
        frames = [*generate_frames(dataset.PixelData, number_of_frames=dataset.NumberOfFrames)]
        if offsets == "extended":
            dataset.PixelData, dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths = encapsulate_extended(
                frames
            )
        else:
            dataset.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=offsets == "basic")
        dataset["PixelData"].is_undefined_length = True

    return change
