"""A frame as a picture: windowed, cropped, scaled (PS3.18 10.4.1.1.3 and 10.4.4)."""

import io
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.header import read_elements, read_header
from models.ct.multiframe import is_multiframe
from models.ct.pixels import frame_count
from models.ct.screening import numbers
from models.ct.windows import WINDOWS, apply_window
from service.dicom_json import BULK_BYTES
from service.dicomweb.media import JPEG, PNG, Media, chosen
from service.dicomweb.retrieve import Kept, check_frames
from service.errors import BadDicomWeb, NotAcceptable

Floats = NDArray[np.float32]

DEFAULT_WINDOW = "abdomen"
QUALITY = 90  # of a JPEG
LONGEST_SIDE = 4096  # pixels of a picture
THUMBNAIL = 128  # pixels


@dataclass(frozen=True)
class Viewport:
    """The picture's size, and the region of the frame that it shows; None for all of it."""

    width: int
    height: int
    region: tuple[float, float, float, float] | None = None  # left, top, width, height; a negative size flips


def rendered(
    kept: Kept, number: int | None, accept: str, *, window: str | None, viewport: str | None, quality: int | None
) -> tuple[bytes, str]:
    """One frame, that in the middle where none is named, as JPEG or PNG, and which of them.

    Raises BadDicomWeb, FrameNotFound or NotAcceptable.
    """
    kind = chosen(accept, [Media(JPEG), Media(PNG)]).media.kind
    shade = parse_window(window or DEFAULT_WINDOW)
    shown = parse_viewport(viewport) if viewport else None
    return _encoded(_scaled(shade(_hu(kept, number)), shown), kind, quality or QUALITY), kind


def thumbnail(kept: Kept, number: int | None, accept: str, viewport: str | None) -> tuple[bytes, str]:
    """The same, small."""
    size = viewport or f"{THUMBNAIL},{THUMBNAIL}"
    return rendered(kept, number, accept, window=None, viewport=size, quality=None)


def middle(kept: list[Kept]) -> Kept:
    """The instance that stands for a series or study: that in the middle of its first series, from feet to head."""
    series = [each for each in kept if each.series_uid == kept[0].series_uid]
    return sorted(series, key=_height)[len(series) // 2]


def parse_window(text: str) -> Callable[[Floats], Floats]:
    """`center,width,function`, or one of our windows by name, as what makes grey in [0, 1] of HU (PS3.3 C.11.2.1.2)."""
    if text in WINDOWS:
        return lambda hu: apply_window(hu, WINDOWS[text])
    center_text, _, rest = text.partition(",")
    width_text, _, function = rest.partition(",")
    try:
        center, width = float(center_text), float(width_text)
    except ValueError as error:
        raise BadDicomWeb(f"window is no center,width,function, nor one of {', '.join(WINDOWS)}") from error
    shortest = 1.0 if function == "linear" else 1e-6
    if not (np.isfinite(center) and abs(center) < 1e9 and shortest <= width < 1e9):
        raise BadDicomWeb(f"the window's center or width is out of range, expected a width of {shortest:g} at least")
    functions: dict[str, Callable[[Floats], Floats]] = {
        "linear": lambda hu: np.clip((hu - (center - 0.5)) / max(width - 1, 1e-6) + 0.5, 0, 1),
        "linear-exact": lambda hu: np.clip((hu - center) / width + 0.5, 0, 1),
        "sigmoid": lambda hu: 1 / (1 + np.exp(np.clip(-4 * (hu - center) / width, -80, 80))),
    }
    if function not in functions:
        raise BadDicomWeb(f"the window's function is none of {', '.join(functions)}")
    return functions[function]


def parse_viewport(text: str) -> Viewport:
    """`width,height` or `width,height,left,top,region width,region height`, of which the last four may be empty."""
    parts = [part.strip() for part in text.split(",")]
    try:
        width, height = int(parts[0]), int(parts[1])
        region = [float(part) if part else None for part in parts[2:]]
    except (ValueError, IndexError) as error:
        raise BadDicomWeb("viewport is not two or six numbers between commas") from error
    if len(parts) not in (2, 6) or not all(each is None or abs(each) < 1e6 for each in region):
        raise BadDicomWeb("viewport is not two or six numbers between commas")
    if not (0 < width <= LONGEST_SIDE and 0 < height <= LONGEST_SIDE):
        raise BadDicomWeb(f"the viewport's sides are not between 1 and {LONGEST_SIDE} pixels")
    if not region:
        return Viewport(width, height)
    left, top, across, down = region
    return Viewport(width, height, (left or 0.0, top or 0.0, across or np.inf, down or np.inf))


def _hu(kept: Kept, number: int | None) -> Floats:
    with kept.reading() as path:
        header = read_elements(path, BULK_BYTES)
        number = number or frame_count(header) // 2 + 1
        check_frames(header, [number])
        try:
            return read_hu(path, number if is_multiframe(header) else None)
        except UndecodableSlice as error:
            raise NotAcceptable(f"frame {number} cannot be decoded: {error}") from error


def _scaled(picture: Floats, viewport: Viewport | None) -> Floats:
    """Cropped to the region, then as large as fits the viewport in the region's proportions."""
    if viewport is None:
        return picture
    if viewport.region:
        left, top, across, down = viewport.region
        bottom, right = top + abs(down), left + abs(across)
        rows, columns = picture.shape
        picture = picture[int(max(top, 0)) : int(min(bottom, rows)), int(max(left, 0)) : int(min(right, columns))]
        if picture.size == 0:
            raise BadDicomWeb(f"the viewport's region lies outside the frame of {columns} x {rows} pixels")
        picture = picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
    rows, columns = picture.shape
    scale = min(viewport.width / columns, viewport.height / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    resized = cv2.resize(
        np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    return np.asarray(resized, np.float32)


def _encoded(picture: Floats, kind: str, quality: int) -> bytes:
    content = io.BytesIO()
    image = Image.fromarray(np.round(picture * 255).astype(np.uint8))
    if kind == JPEG:
        image.save(content, "JPEG", quality=quality)
    else:
        image.save(content, "PNG")
    return content.getvalue()


def _height(kept: Kept) -> tuple[float, str]:
    with kept.reading() as path:
        position = numbers(read_header(path), "ImagePositionPatient", 3)
    return (0.0 if position is None else float(position[2])), kept.sop_uid
