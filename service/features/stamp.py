"""HDF5 as STAMP's `modeling/data.py` reads tile-level features (layout of STAMP 2.1 to 2.5).

STAMP: El Nahhas et al., "From whole-slide image to biomarker prediction", Nature Protocols 2025;
github.com/KatherLab/STAMP.
"""

import csv
import io
import json
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from service.features.bags import FeatureBag
from service.features.outbox import Lines, Outbox

STAMP_VERSION = "2.1.0"  # the first of this layout; a STAMP older than a file's version refuses the file
MICRONS = 1000.0  # in a mm
ALONE_MM = 1.0  # the tile size of a series that has no spacing, for want of any


def stamp_zip(bags: Iterable[FeatureBag], about: dict[str, Any], _dim: int, scratch: Path) -> Iterator[bytes]:
    """`<series_uid>.h5` each, `slide.csv` as STAMP's slide table, `receipts.jsonl`."""
    outbox, receipts = Outbox(), Lines(scratch)
    slides = io.StringIO()
    slide_table = csv.writer(slides)
    slide_table.writerow(["PATIENT", "FILENAME"])
    with zipfile.ZipFile(outbox, "w") as archive:
        for bag in bags:
            archive.writestr(f"{bag.series_uid}.h5", stamp_file(bag, about))
            slide_table.writerow([bag.patient, f"{bag.series_uid}.h5"])
            receipts.add({"series_uid": bag.series_uid, "patient": bag.patient, "receipt": bag.receipt})
            yield outbox.take()
        archive.writestr("slide.csv", slides.getvalue())
        yield from receipts.into(archive, "receipts.jsonl", outbox)
    yield outbox.take()


def stamp_file(bag: FeatureBag, about: dict[str, Any]) -> bytes:
    """`feats` (slices * windows, dim) and `coords` (slices * windows, 2) in µm: position from feet to head, and 0.

    The windows of a slice follow one another and lie at one place. `slice`, `window`, `sop_uid` and `receipt` are ours.
    """
    import h5py

    slices, windows, dim = bag.vectors.shape
    z_um = np.repeat(np.asarray(bag.receipt["z_mm"], np.float64) * MICRONS, windows)
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file["feats"] = bag.vectors.reshape(-1, dim)
        file["coords"] = np.stack([z_um, np.zeros_like(z_um)], axis=1)
        file["slice"] = np.repeat(np.arange(slices, dtype=np.int32), windows)
        file["window"] = np.array([*bag.windows] * slices, "S")
        file["sop_uid"] = np.array([uid for uid in bag.receipt["sop_uids"] for _ in bag.windows], "S")
        file["receipt"] = json.dumps(bag.receipt)  # an attribute holds 64 KB only
        file.attrs.update(
            {
                "stamp_version": STAMP_VERSION,
                "extractor": about["encoder_id"],
                "encoder": about["encoder_id"],
                "precision": "float16",
                "unit": "um",
                "tile_size_um": _spacing_mm(bag.receipt) * MICRONS,
                "feat_type": "tile",
                "series_uid": bag.series_uid,
                "keyslice_version": version("keyslice"),
            }
        )
    return content.getvalue()


def _spacing_mm(receipt: dict[str, Any]) -> float:
    return float(receipt["geometry"].get("slice_spacing_mm") or ALONE_MM)
