"""DeepLesion as its authors publish it (Yan et al., J. Med. Imaging 5(3), 036501, 2018)."""

import logging
import struct
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from models.lecl.boxes import inside, number, read_table
from models.lecl.sources import BadSource, Box, CTImage

TABLE = "DL_info.csv"
COLUMNS = ("File_name", "Patient_index", "Bounding_boxes", "Possibly_noisy", "Spacing_mm_px_", "Train_Val_Test")
SPLITS = {"train": "1", "val": "2", "test": "3"}  # the authors' own, by patient
HU_OF_ZERO = -32768
MARGIN_PX = 5.0  # between a box and the diameters it was made of: so far it may reach over the slice's edge

PNG = b"\x89PNG\r\n\x1a\n"
GRAY_16 = b"\x10\x00"  # bit depth 16, colour type 0

log = logging.getLogger(__name__)


@dataclass
class _KeySlice:
    path: Path
    patient: str
    spacing_mm: tuple[float, float]
    boxes: list[tuple[int, Box]]  # with the line of the table each stands on


class DeepLesion:
    """The key slices of one part, "train", "val" or "test", each with its lesions.

    Rows that the authors mark as possibly noisy are left out. The slices around a key slice are not offered: nobody
    has annotated them, and they may show the same lesion. Raises BadSource where the folder is not as published.
    """

    def __init__(self, folder: Path, split: str = "train") -> None:
        if split not in SPLITS:
            raise BadSource(f"no part {split!r} of DeepLesion, expected one of {', '.join(SPLITS)}")
        slices = list(_key_slices(folder, SPLITS[split]).values())
        if not slices:
            raise BadSource(f"{TABLE} has no row of the part {split!r}")
        missing = [each.path for each in slices if not each.path.is_file()]
        if missing:
            raise BadSource(
                f"{len(missing)} of {len(slices)} slices of the part {split!r} are not there, the first Images_png/"
                f"{missing[0].parent.name}/{missing[0].name}: expected all archives of DeepLesion unpacked"
            )
        self._slices = tuple(slices)
        self._boxes = tuple(_boxes(each) for each in slices)
        self.patients = tuple(each.patient for each in slices)
        log.info("DeepLesion %s: %d key slices, %d boxes", split, len(slices), sum(map(len, self._boxes)))

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, index: int) -> CTImage:
        found = self._slices[index]
        stored = cv2.imread(str(found.path), cv2.IMREAD_UNCHANGED)
        if stored is None or stored.dtype != np.uint16 or stored.ndim != 2:
            raise BadSource(f"{_name(found.path)} cannot be decoded, expected a 16-bit PNG")
        hu = (stored.astype(np.int32) + HU_OF_ZERO).astype(np.int16)
        return CTImage(hu, found.spacing_mm, self._boxes[index])


def _key_slices(folder: Path, part: str) -> dict[str, _KeySlice]:
    """By file name; a slice with several lesions has a row for each."""
    slices: dict[str, _KeySlice] = {}
    noisy = 0
    for line, cells in read_table(folder / TABLE, COLUMNS):
        if cells["Train_Val_Test"] != part:
            continue
        if cells["Possibly_noisy"] != "0":
            noisy += 1
            continue
        where = f"{TABLE} line {line}"
        x0, y0, x1, y1 = _numbers(cells["Bounding_boxes"], 4, f"{where}: Bounding_boxes")
        across, down, _ = _numbers(cells["Spacing_mm_px_"], 3, f"{where}: Spacing_mm_px_")
        if min(across, down) <= 0:
            raise BadSource(f"{where}: pixels of {across:g} x {down:g} mm, expected above 0")
        series, _, file = cells["File_name"].rpartition("_")
        found = slices.setdefault(
            cells["File_name"],
            _KeySlice(
                folder / "Images_png" / series / file, f"deeplesion-{cells['Patient_index']}", (down, across), []
            ),
        )
        found.boxes.append((line, Box(x0 - 1, y0 - 1, x1 - 1, y1 - 1)))  # the table counts pixels from 1
    if noisy:
        log.info("left out %d possibly noisy rows of %s", noisy, TABLE)
    return slices


def _boxes(found: _KeySlice) -> tuple[Box, ...]:
    """The slice's boxes; the margin that the authors put around a lesion ends at the slice's edge."""
    rows, columns = _size(found.path)
    boxes = []
    for line, box in found.boxes:
        over = max(-box.x0, -box.y0, box.x1 - (columns - 1), box.y1 - (rows - 1))
        held = Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, columns - 1), min(box.y1, rows - 1))
        boxes.append(inside(box if over > MARGIN_PX else held, rows, columns, f"{TABLE} line {line}"))
    return tuple(boxes)


def _size(path: Path) -> tuple[int, int]:
    """Rows and columns by the PNG's header (ISO/IEC 15948, 11.2.2). Raises BadSource unless it is 16-bit gray."""
    with path.open("rb") as file:
        head = file.read(26)
    if len(head) < 26 or not head.startswith(PNG):
        raise BadSource(f"{_name(path)} is no PNG, expected a 16-bit one")
    if head[24:26] != GRAY_16:
        raise BadSource(f"{_name(path)} has {head[24]} bits and colour type {head[25]}, expected 16 bits of gray")
    columns, rows = struct.unpack(">II", head[16:24])
    return rows, columns


def _numbers(text: str, count: int, where: str) -> list[float]:
    values = text.split(",")
    if len(values) != count:
        raise BadSource(f"{where} holds {len(values)} values, expected {count}")
    return [number(value.strip(), where) for value in values]


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
