"""A folder of DICOM files as slices for pretraining."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.multiframe import is_multiframe
from models.ct.reasons import Reason
from models.ct.screening import SetAside, screened_header
from models.ct.series import CTSlice, slice_of
from models.lecl.boxes import Boxes, inside, read_boxes
from models.lecl.hu_cache import cache_of, fill_cache
from models.lecl.sources import BadSource, Box, CTImage
from models.spawn import SPAWN

FEW = 1000  # files; they are read sooner than other processes have started
AT_ONCE = 512  # files; their answers wait in memory for whoever takes them, half a megabyte each
NO_SPACING = "no_pixel_spacing"

Item = TypeVar("Item")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Found:
    slice: CTSlice
    spacing_mm: tuple[float, float]
    series_uid: str
    patient: str


class Archive:
    """The axial CT slices below a folder, series by series from feet to head, with boxes where a table gives some.

    `boxes` is a CSV with `sop_uid,x0,y0,x1,y1`, see Box. Headers are read now; files that are no axial CT slice with
    pixel spacing are set aside, and an instance that lies there twice counts once. With a `cache` folder all slices are
    decoded now and once for all runs, and those that cannot be are set aside; without one, each is decoded when it is
    asked for. Raises BadSource where there is no slice, or a box does not fit.
    """

    def __init__(self, folder: Path, boxes: Path | None = None, cache: Path | None = None) -> None:
        found, set_aside, duplicates = _slices_below(folder)
        placed = _placed(read_boxes(boxes), found, boxes.name) if boxes and found else {}
        self._cache = cache_of([each.slice for each in found], cache) if cache and found else None
        self._places = tuple(range(len(found)))  # in the cache
        if self._cache:
            fill_cache(self._cache, _side_by_side(_decoded_or_none, [each.slice.path for each in found]))
            self._places = tuple(np.flatnonzero(self._cache.decoded()).tolist())
            set_aside[str(Reason.UNDECODABLE)] += len(found) - len(self._places)
        self._found = tuple(found[place] for place in self._places)
        if not self._found:
            raise BadSource(
                f"{set_aside.total()} files and no axial CT slice with pixel spacing, expected at least one"
            )
        self._boxes = tuple(placed.get(each.slice.sop_uid, ()) for each in self._found)
        self.sop_uids = tuple(each.slice.sop_uid for each in self._found)
        self.patients = tuple(each.patient for each in self._found)
        counts = len(self), sum(map(len, self._boxes)), duplicates, dict(+set_aside)
        log.info("%d slices, %d boxes, %d duplicates; set aside %s", *counts)

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, index: int) -> CTImage:
        found = self._found[index]
        if self._cache:
            hu = self._cache[self._places[index]]
        else:
            try:
                hu = _decoded(found.slice.path)
            except UndecodableSlice as error:
                raise BadSource(f"slice {found.slice.sop_uid}: {error}") from error
        return CTImage(hu, found.spacing_mm, self._boxes[index])


def patient_key(patient_id: str) -> str:
    """What stands for a PatientID in `patients`: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(patient_id.encode()).hexdigest()[:16]


def _slices_below(folder: Path) -> tuple[list[_Found], Counter[str], int]:
    """The slices by series and height, what was set aside by reason, and how many instances were there again."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    different: dict[str, _Found] = {}
    set_aside: Counter[str] = Counter()
    for each in _side_by_side(_read, files):
        if isinstance(each, str):
            set_aside[each] += 1
        else:
            different.setdefault(each.slice.sop_uid, each)
    ordered = sorted(different.values(), key=lambda each: (each.series_uid, each.slice.z_mm, each.slice.sop_uid))
    return ordered, set_aside, len(files) - set_aside.total() - len(ordered)


def _read(path: Path) -> _Found | str:
    """The file's slice, or the reason why it is none."""
    header = screened_header(path)
    if isinstance(header, SetAside):
        return str(header.reason)
    if is_multiframe(header):
        return str(Reason.MULTIFRAME)
    found = slice_of(path, header)
    if found.pixel_spacing_mm is None or min(found.pixel_spacing_mm) <= 0:
        return NO_SPACING
    # As the service does with a patient without PatientID.
    patient = str(header.get("PatientID") or "").strip() or f"unknown-{header.StudyInstanceUID}"
    return _Found(found, found.pixel_spacing_mm, str(header.SeriesInstanceUID), patient_key(patient))


def _placed(boxes: Boxes, found: Sequence[_Found], table: str) -> dict[str, tuple[Box, ...]]:
    """Each slice's boxes by its SOP UID. Raises BadSource for a box outside its slice or of no slice."""
    sizes = {each.slice.sop_uid: (each.slice.rows, each.slice.columns) for each in found}
    if unknown := {sop_uid: rows for sop_uid, rows in boxes.items() if sop_uid not in sizes}:
        line = min(line for rows in unknown.values() for line, _ in rows)
        raise BadSource(
            f"{sum(map(len, unknown.values()))} of {sum(map(len, boxes.values()))} rows of {table} are boxes of "
            f"{len(unknown)} sop_uid that no usable slice has, the first on line {line}; expected slices for all rows"
        )
    return {
        sop_uid: tuple(inside(box, *sizes[sop_uid], f"{table} line {line}, slice {sop_uid}") for line, box in rows)
        for sop_uid, rows in boxes.items()
    }


def _decoded(path: Path) -> NDArray[np.int16]:
    """(rows, columns): HU rounded and held within int16. Raises UndecodableSlice."""
    limits = np.iinfo(np.int16)
    hu: NDArray[np.int16] = np.clip(np.rint(read_hu(path)), limits.min, limits.max).astype(np.int16)
    return hu


def _decoded_or_none(path: Path) -> NDArray[np.int16] | None:
    try:
        return _decoded(path)
    except UndecodableSlice:
        return None


def _side_by_side(function: Callable[[Item], Answer], items: Sequence[Item]) -> Iterator[Answer]:
    """function(item) for each in order, by several processes where there are many."""
    if len(items) <= FEW:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(mp_context=SPAWN) as processes:
        for start in range(0, len(items), AT_ONCE):
            yield from processes.map(function, items[start : start + AT_ONCE], chunksize=16)
