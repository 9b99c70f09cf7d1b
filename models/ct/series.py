"""One CT series: its axial slices from feet to head, and the verdict on its geometry."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import uid
from pydicom.dataset import FileDataset

from models.ct.decode import DECODERS, JPEG_12_BITS
from models.ct.header import texts
from models.ct.nifti import nifti_range
from models.ct.screening import SetAside, numbers, screened_headers, slice_normal, tilt_degrees
from models.ct.stack import MISSING, UNEVEN, one_stack

NO_AIR_HU = -200.0  # a CT that was not cropped within the body holds values below: air, and fat nearly
MOST_NAMED = 20  # positions in a finding
TILTED_DEGREES = 1.0  # below it, header rounding

UNSPECIFIED = "US"  # RescaleType of values in no particular unit (PS3.3 C.11.1.1.2)

# These lose something whatever LossyImageCompression says; JPEG 2000 and HTJ2K may or may not.
LOSSY_SYNTAXES = (uid.JPEGBaseline8Bit, *JPEG_12_BITS, uid.JPEGLSNearLossless)


@dataclass(frozen=True)
class CTSlice:
    """What ordering needs of one slice's header."""

    path: Path
    sop_uid: str
    frame: int | None  # of a multi-frame file, from 1
    z_mm: float  # ImagePositionPatient along the normal that points to the head, or SliceLocation
    placed_by_location: bool  # by SliceLocation, for want of ImagePositionPatient
    normal: tuple[float, float, float]
    orientation: tuple[float, ...]  # ImageOrientationPatient
    rows: int
    columns: int
    pixel_spacing_mm: tuple[float, float] | None  # between rows, between columns
    slope: float | None
    intercept: float | None
    unit: str  # RescaleType
    kernel: str
    acquisition: int
    instance: int
    decoder: str
    lossy: bool
    nifti_range: tuple[float, float] | None  # lowest and highest value of the NIfTI volume it was made from


class Status(StrEnum):
    ACCEPTED = "accepted"
    ACCEPTED_WITH_WARNINGS = "accepted_with_warnings"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Finding:
    """One machine-readable reason of a verdict, with the numbers found."""

    code: str
    found: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    status: Status
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class CTSeries:
    slices: tuple[CTSlice, ...]  # feet to head
    set_aside: tuple[tuple[str, SetAside], ...]  # file name and reason

    @property
    def spacing_mm(self) -> float | None:
        """The median step between slices, or None for a single slice."""
        return float(np.median(self._steps())) if len(self.slices) > 1 else None

    def geometry(self) -> dict[str, Any]:
        """The numbers a reader checks first, as JSON."""
        first = self.slices[0]
        return {
            "slices": len(self.slices),
            "rows": first.rows,
            "columns": first.columns,
            "pixel_spacing_mm": first.pixel_spacing_mm,
            "slice_spacing_mm": self.spacing_mm and round(self.spacing_mm, 4),
            "z_mm": [self.slices[0].z_mm, self.slices[-1].z_mm],
            "tilt_degrees": round(tilt_degrees(np.array(first.normal)), 2),
            "kernels": sorted({each.kernel for each in self.slices}),
        }

    def verdict(self) -> Verdict:
        """Accepted, accepted with warnings, or rejected; each reason with what was found."""
        if not self.slices:
            return Verdict(Status.REJECTED, (Finding("no_usable_slices", {"set_aside": len(self.set_aside)}),))
        findings = [*self._spacing_findings(), *self._mixture_findings(), *self._source_findings()]
        return Verdict(Status.ACCEPTED_WITH_WARNINGS if findings else Status.ACCEPTED, tuple(findings))

    def _steps(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.diff([each.z_mm for each in self.slices])

    def _spacing_findings(self) -> Iterable[Finding]:
        if len(self.slices) < 2:
            yield Finding("single_slice")
            return
        steps, spacing = self._steps(), float(np.median(self._steps()))
        missing = np.flatnonzero(steps > MISSING * spacing)
        if len(missing):
            gaps = [
                {"after_slice": int(k), "after_mm": self.slices[k].z_mm, "gap_mm": round(float(steps[k]), 3)}
                for k in missing
            ]
            yield Finding("missing_slices", {"gaps": gaps, "expected_mm": round(spacing, 3)})
        present = steps[steps <= MISSING * spacing]
        if np.any(np.abs(present - spacing) > UNEVEN * spacing):
            found = {"min_mm": round(float(present.min()), 3), "max_mm": round(float(present.max()), 3)}
            uneven = np.flatnonzero((np.abs(steps - spacing) > UNEVEN * spacing) & (steps <= MISSING * spacing))
            after = [self.slices[k].z_mm for k in uneven[:MOST_NAMED]]
            yield Finding("uneven_spacing", {**found, "expected_mm": round(spacing, 3), "after_mm": after})

    def _mixture_findings(self) -> Iterable[Finding]:
        tilt = tilt_degrees(np.array(self.slices[0].normal))
        if tilt > TILTED_DEGREES:
            yield Finding("tilted", {"degrees": round(tilt, 2)})
        sizes = Counter((each.rows, each.columns) for each in self.slices)
        if len(sizes) > 1:
            yield Finding("mixed_sizes", {f"{rows}x{columns}": n for (rows, columns), n in sizes.items()})
        kernels = Counter(each.kernel for each in self.slices)
        if len(kernels) > 1:
            yield Finding("mixed_kernels", dict(kernels))

    def _source_findings(self) -> Iterable[Finding]:
        reasons = Counter(each.reason for _, each in self.set_aside)
        if reasons:
            yield Finding("slices_set_aside", {str(reason): n for reason, n in reasons.items()})
        if unscaled := sum(each.slope is None or each.intercept is None for each in self.slices):
            yield Finding("missing_rescale", {"slices": unscaled, "assumed": "slope 1, intercept 0"})
        if unplaced := sum(each.placed_by_location for each in self.slices):
            found = {"slices": unplaced, "assumed": "SliceLocation is the position, growing towards the head"}
            yield Finding("position_assumed", found)
        yield from self._nifti_findings()
        if unspecified := sum(each.unit == UNSPECIFIED for each in self.slices):
            yield Finding("unit_unspecified", {"slices": unspecified, "assumed": "HU"})
        if lossy := sum(each.lossy for each in self.slices):
            yield Finding("lossy_source", {"slices": lossy})

    def _nifti_findings(self) -> Iterable[Finding]:
        ranges = [each.nifti_range for each in self.slices if each.nifti_range is not None]
        if not ranges:
            return
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        yield Finding("nifti_hu_assumed", {"slices": len(ranges), "from": low, "to": high})
        if low > NO_AIR_HU:
            yield Finding("nifti_unlike_hu", {"from": low, "expected": f"values below {NO_AIR_HU:g}, as air has"})


def read_series(paths: Iterable[Path]) -> CTSeries:
    """The series in these DICOM files, from their headers alone; without slices where none is usable."""
    return arrange((path, found) for path in sorted(paths) for found in read_slices(path))


def arrange(files: Iterable[tuple[Path, CTSlice | SetAside]]) -> CTSeries:
    """The series that these slices make, and the files set aside."""
    slices: list[CTSlice] = []
    set_aside: list[tuple[str, SetAside]] = []
    for path, found in files:
        if isinstance(found, SetAside):
            set_aside.append((path.name, found))
        else:
            slices.append(found)
    ordered, dropped = one_stack(slices)
    return CTSeries(tuple(ordered), tuple(set_aside + dropped))


def read_slices(path: Path) -> list[CTSlice | SetAside]:
    """What the file's header says of its slice, or of its frames, or why they are none."""
    return [
        header if isinstance(header, SetAside) else slice_of(path, header, frame)
        for frame, header in screened_headers(path)
    ]


def slice_of(path: Path, header: FileDataset, frame: int | None = None) -> CTSlice:
    """What a screened header says of its slice."""
    orientation, position = numbers(header, "ImageOrientationPatient", 6), numbers(header, "ImagePositionPatient", 3)
    location = numbers(header, "SliceLocation", 1)
    assert orientation is not None  # screening has checked it
    normal = slice_normal(orientation)
    if position is None:
        assert location is not None  # or that
        z_mm = float(location[0])
    else:
        z_mm = float(position @ normal)
    syntax = header.file_meta.get("TransferSyntaxUID", uid.ImplicitVRLittleEndian)
    spacing, slope, intercept = (
        numbers(header, "PixelSpacing", 2),
        numbers(header, "RescaleSlope", 1),
        numbers(header, "RescaleIntercept", 1),
    )
    return CTSlice(
        path=path,
        sop_uid=str(header.SOPInstanceUID),
        frame=frame,
        z_mm=round(z_mm, 4),
        placed_by_location=position is None,
        normal=(float(normal[0]), float(normal[1]), float(normal[2])),
        orientation=tuple(map(float, orientation)),
        rows=int(header.Rows),
        columns=int(header.Columns),
        pixel_spacing_mm=None if spacing is None else (float(spacing[0]), float(spacing[1])),
        slope=None if slope is None else float(slope[0]),
        intercept=None if intercept is None else float(intercept[0]),
        unit=str(header.get("RescaleType") or "").upper(),
        kernel="/".join(texts(header, "ConvolutionKernel")),
        acquisition=_integer(header, "AcquisitionNumber"),
        instance=_integer(header, "InstanceNumber"),
        decoder=DECODERS[syntax],
        nifti_range=nifti_range(str(header.get("DerivationDescription") or "")),
        lossy=str(header.get("LossyImageCompression", "")) == "01" or syntax in LOSSY_SYNTAXES,
    )


def _integer(header: FileDataset, keyword: str) -> int:
    """An integer string, or 0 where the header holds none: it only breaks ties."""
    try:
        return int(header.get(keyword))
    except (TypeError, ValueError, OverflowError):
        return 0
