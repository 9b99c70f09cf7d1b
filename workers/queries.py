"""The recipe of a slice that is searched by: through the encoder, and nowhere else."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from models.ct.errors import UndecodableSlice
from models.ct.screening import Frames, SetAside
from models.ct.slices import encoder_input, prepare_slice
from models.specs import EncoderSpec
from workers.resources import Resources

DEEPEST = {"L": 255.0, "I;16": 65535.0, "I": 65535.0}  # grey values of a PNG by Pillow's mode


def embed_query(query_id: str, encoder_id: str, window: str, worker: Resources) -> None:
    """Embed an uploaded slice, or say why not. `window` names the one a PNG shows; a DICOM file needs none."""
    queries, encoder = worker.stores.queries, worker.line(encoder_id).encoder
    path = queries.path(query_id)
    if not path.exists():  # whoever asked has gone
        return
    picture = _dicom(path, encoder.spec) if not window else _png(path, encoder.spec, window)
    if isinstance(picture, str):
        queries.refuse(query_id, picture)
        return
    embedding = encoder.encode(picture[None])[0]  # (windows, dim)
    if window:
        embedding = np.repeat(embedding[[_place(encoder.spec, window)]], len(encoder.spec.windows), axis=0)
    queries.answer(query_id, embedding)


def _dicom(path: Path, spec: EncoderSpec) -> NDArray[np.float32] | str:
    """The encoder's input, or why there is none."""
    out = np.empty((len(spec.windows), spec.input_size, spec.input_size), np.float32)
    found = prepare_slice(path, out, spec.windows, spec.input_size)
    if isinstance(found, Frames) and found.count == 1:
        found = prepare_slice((path, 1), out, spec.windows, spec.input_size)
    if isinstance(found, Frames):
        return f"the file holds {found.count} frames, expected one slice"
    return f"the file is no slice that can be embedded: {found.detail}" if isinstance(found, SetAside) else out


def _png(path: Path, spec: EncoderSpec, window: str) -> NDArray[np.float32] | str:
    """Grey values from black to white are the window from end to end."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            grey = picture if picture.mode in DEEPEST else picture.convert("L")
            shown = np.asarray(grey, np.float32) / DEEPEST[grey.mode]  # 0 to 1
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        return f"the PNG does not decode: {type(error).__name__}"
    at = spec.windows[_place(spec, window)]
    try:
        return encoder_input(at.low + shown * (at.high - at.low), spec.windows, spec.input_size)
    except UndecodableSlice as error:
        return str(error)


def _place(spec: EncoderSpec, window: str) -> int:
    return [each.name for each in spec.windows].index(window)
