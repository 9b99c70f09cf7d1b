"""The real patients that fidelity is measured on: their series, slices and annotated nodules."""

import json
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray

from models.ct.decode import read_hu
from models.lecl.archive import patient_key

# In the order in which they are dealt to the folds: the annotated ones first, so that they land in different folds.
VOLUMES = (
    "lidc-idri-0001",
    "lidc-idri-0314",
    "lung-fused-ct-0001",
    "acrin-flt-breast-001",
    "cptac-pda-c3l-00189",
    "oddities/totalseg_ct20",
)
SINGLE_SLICES = "tcga-luad-lusc-contrast"
NEVER_TRAINED_ON = {"oddities/totalseg_ct20"}  # without UIDs: the archive sets it aside


@dataclass(frozen=True)
class Nodule:
    """A real nodule as its readers saw it, cut out of its series."""

    patient: str
    hu: NDArray[np.float32]  # (slices, rows, columns)
    mask: NDArray[np.bool_]  # half of the readers at least
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Series:
    """One real series, feet to head."""

    name: str
    patient: str
    hu: NDArray[np.int16]  # (slices, rows, columns)
    z_mm: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]  # between slices, rows, columns
    nodule: Nodule | None = None
    nodule_slices: tuple[int, ...] = ()  # where half of the readers at least saw it
    suspect_slices: tuple[int, ...] = ()  # where any reader saw it, and a slice on either side


@dataclass(frozen=True)
class Single:
    """A slice without a series."""

    patient: str
    hu: NDArray[np.int16]  # (rows, columns)
    contrast: bool


def read_volumes(data: Path, unpacked: Path) -> list[Series]:
    """Every series of VOLUMES, archives unpacked once below `unpacked`. Folders that are absent are left out."""
    return [series for name in VOLUMES if (data / name).is_dir() for series in _read_patient(data, unpacked, name)]


def read_singles(data: Path, unpacked: Path) -> list[Single]:
    """The different slices (by SOPInstanceUID) whose file name says whether contrast was given."""
    found: dict[str, Single] = {}
    patients: dict[str, str] = {}  # numbered as they come: an id is nobody's business
    for path in _files(data, unpacked, SINGLE_SLICES):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        patient = patients.setdefault(str(header.PatientID), f"single-{len(patients)}")
        contrast = "CONTRAST_1" in path.name
        found.setdefault(str(header.SOPInstanceUID), Single(patient, read_hu(path).astype(np.int16), contrast))
    return list(found.values())


def keys(unpacked: Path) -> dict[str, set[str]]:
    """The keys under which models/lecl/archive.py knows the patients that are unpacked here."""
    found: dict[str, set[str]] = {}
    for path in sorted(unpacked.rglob("*.dcm")):
        folder = path.relative_to(unpacked).parts[0]
        key = patient_key(str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).PatientID))
        if folder == SINGLE_SLICES:  # numbered as read_singles does
            numbers = [name for name, known in found.items() if name.startswith("single-") and key in known]
            folder = numbers[0] if numbers else f"single-{sum(name.startswith('single-') for name in found)}"
        found.setdefault(folder, set()).add(key)
    return found


def _read_patient(data: Path, unpacked: Path, name: str) -> list[Series]:
    groups = defaultdict(list)
    for path in _files(data, unpacked, name):
        header = pydicom.dcmread(path, stop_before_pixels=True)
        groups[str(header.SeriesInstanceUID)].append((float(header.ImagePositionPatient[2]), path, header))
    found = []
    for number, uid in enumerate(sorted(groups)):
        # By position, here and not by models.ct.series: totalseg_ct20 has no UIDs, which the service rightly refuses.
        ordered = sorted(groups[uid], key=lambda each: each[0])
        hu = np.stack([read_hu(path).astype(np.int16) for _, path, _ in ordered])
        z_mm = np.array([z for z, _, _ in ordered])
        rows_mm, columns_mm = (float(each) for each in ordered[0][2].PixelSpacing)
        series = Series(
            f"{name.replace('/', '-')}-{number}", name, hu, z_mm, (float(np.median(np.diff(z_mm))), rows_mm, columns_mm)
        )
        annotations = data / name / "annotations.json"
        found.append(
            _annotated(series, annotations, [str(h.SOPInstanceUID) for *_, h in ordered])
            if annotations.is_file()
            else series
        )
    return found


def _files(data: Path, unpacked: Path, name: str) -> list[Path]:
    archives = sorted((data / name).glob("*.tar.xz"))
    if not archives:
        return sorted(path for path in (data / name).iterdir() if path.is_file())
    folder = unpacked / name
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        for archive in archives:
            with tarfile.open(archive, "r:xz") as opened:
                opened.extractall(partial, filter="data")
        partial.rename(folder)
    return sorted(folder.rglob("*.dcm"))


def _annotated(series: Series, annotations: Path, sop_uids: list[str]) -> Series:
    """The series with its nodule: consensus of half of the readers."""
    said = json.loads(annotations.read_text())
    votes = np.zeros(series.hu.shape, np.int8)
    for reader in said["annotations"]:
        drawn = np.zeros(series.hu.shape, np.uint8)
        for contour in sorted(reader["contours"], key=lambda each: not each["inclusion"]):  # holes last
            points = np.array(contour["points_xy"], np.int32)
            cv2.fillPoly(drawn[sop_uids.index(contour["SOPInstanceUID"])], [points], int(contour["inclusion"]))
        votes += drawn.astype(np.int8)
    consensus = votes * 2 >= said["readers"]
    seen = np.flatnonzero(consensus.any(axis=(1, 2)))
    anyone = np.flatnonzero(votes.any(axis=(1, 2)))
    suspect = range(max(0, anyone[0] - 1), min(len(votes), anyone[-1] + 2))
    box = tuple(
        slice(int(at.min()) - margin, int(at.max()) + 1 + margin)
        for at, margin in zip(np.nonzero(consensus), (2, 12, 12), strict=True)
    )
    nodule = Nodule(series.patient, series.hu[box].astype(np.float32), consensus[box], series.spacing_mm)
    return Series(
        series.name,
        series.patient,
        series.hu,
        series.z_mm,
        series.spacing_mm,
        nodule,
        tuple(map(int, seen)),
        tuple(suspect),
    )
