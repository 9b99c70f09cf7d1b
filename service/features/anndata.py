"""AnnData's .h5ad: an observation per slice and window.

Written row by row as AnnData's on-disk format says (anndata 0.12, "On-disk format"); the library itself holds all of X.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from service.features.bags import FeatureBag
from service.features.outbox import BLOCK

if TYPE_CHECKING:
    import h5py

CATEGORIES = ("series_uid", "study_uid", "patient", "body_part", "manufacturer", "model", "kernel", "window")
ROWS_PER_CHUNK = 1024
VECTOR_CHUNK = 2**20  # bytes


def h5ad(bags: Iterable[FeatureBag], about: dict[str, Any], dim: int, scratch: Path) -> Iterator[bytes]:
    """HDF5 is written to and fro: the whole file is made on the disk, then sent. It has no name there."""
    import h5py

    with tempfile.TemporaryFile(dir=scratch) as file:
        with h5py.File(file, "w") as written:
            observations = _Observations(written, dim)
            for bag in bags:
                observations.add(bag)
            observations.finish(about)
        file.seek(0)
        while block := file.read(BLOCK):
            yield block


class _Observations:
    """X, obs and the receipts, growing by a series at a time."""

    def __init__(self, file: "h5py.File", dim: int) -> None:
        import h5py

        self._file, self._dim = file, dim
        text = h5py.string_dtype()
        rows = max(1, VECTOR_CHUNK // (dim * 4))
        # float32: what works on AnnData takes no half floats. Each float16 is one exactly.
        self._x = _growing(file, "X", np.float32, (rows, dim), "array")
        self._obs = file.create_group("obs")
        self._columns = {
            "_index": _growing(self._obs, "_index", text, (ROWS_PER_CHUNK,), "string-array"),
            "slice": _growing(self._obs, "slice", np.int32, (ROWS_PER_CHUNK,), "array"),
            "z_mm": _growing(self._obs, "z_mm", np.float64, (ROWS_PER_CHUNK,), "array"),
            "sop_uid": _growing(self._obs, "sop_uid", text, (ROWS_PER_CHUNK,), "string-array"),
        }
        self._codes = {
            name: _growing(self._obs.create_group(name), "codes", np.int32, (ROWS_PER_CHUNK,), "array")
            for name in CATEGORIES
        }
        self._known: dict[str, dict[str, int]] = {name: {} for name in CATEGORIES}
        self._receipts = _growing(file.create_group("uns"), "receipts", text, (64,), "string-array")

    def add(self, bag: FeatureBag) -> None:
        slices, windows, _ = bag.vectors.shape
        uids, z_mm = bag.receipt["sop_uids"], np.asarray(bag.receipt["z_mm"], np.float64)
        _append(self._x, bag.vectors.reshape(-1, self._dim).astype(np.float32))
        names = [f"{bag.series_uid}/{number}/{window}" for number in range(slices) for window in bag.windows]
        _append(self._columns["_index"], names)
        _append(self._columns["slice"], np.repeat(np.arange(slices, dtype=np.int32), windows))
        _append(self._columns["z_mm"], np.repeat(z_mm, windows))
        _append(self._columns["sop_uid"], [uid for uid in uids for _ in bag.windows])
        for name, codes in self._codes.items():
            values = [*bag.windows] * slices if name == "window" else [getattr(bag, name)] * (slices * windows)
            known = self._known[name]
            _append(codes, np.array([known.setdefault(value, len(known)) for value in values], np.int32))
        _append(self._receipts, [json.dumps({"series_uid": bag.series_uid, **bag.receipt})])

    def finish(self, about: dict[str, Any]) -> None:
        for name, known in self._known.items():
            group = self._obs[name]
            _text_array(group, "categories", list(known))
            _encoded(group, "categorical", ordered=False)
        order = ["series_uid", "slice", "window", "z_mm", "sop_uid", *(name for name in CATEGORIES[1:-1])]
        _encoded(self._obs, "dataframe", _index="_index", **{"column-order": order})
        var = self._file.create_group("var")
        _text_array(var, "_index", [str(number) for number in range(self._dim)])
        _encoded(var, "dataframe", _index="_index", **{"column-order": np.array([], "S1")})
        uns = self._file["uns"]
        uns["about"] = json.dumps(about)
        _encoded(uns["about"], "string")
        for name in ("layers", "obsm", "obsp", "varm", "varp"):
            self._file.create_group(name)
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            _encoded(self._file[name], "dict")
        _encoded(self._file, "anndata")


VERSIONS = {"anndata": "0.1.0", "dict": "0.1.0"}


def _encoded(place: Any, kind: str, **more: Any) -> None:
    place.attrs.update({"encoding-type": kind, "encoding-version": VERSIONS.get(kind, "0.2.0"), **more})


def _growing(group: Any, name: str, dtype: Any, chunk: tuple[int, ...], kind: str) -> "h5py.Dataset":
    """An empty dataset that grows along its first axis."""
    rest = chunk[1:]
    dataset = group.create_dataset(name, (0, *rest), dtype, maxshape=(None, *rest), chunks=chunk)
    _encoded(dataset, kind)
    return dataset


def _text_array(group: Any, name: str, values: list[str]) -> None:
    import h5py

    _encoded(group.create_dataset(name, data=np.array(values, object), dtype=h5py.string_dtype()), "string-array")


def _append(dataset: Any, values: Any) -> None:
    start = len(dataset)
    dataset.resize(start + len(values), axis=0)
    dataset[start:] = values
