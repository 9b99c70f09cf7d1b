"""One Zarr v3 group in a zip: all slices of the cohort behind one another in one array."""

import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.features.bags import FeatureBag
from service.features.outbox import Lines, Outbox

CHUNK_BYTES = 4 * 2**20
LAYOUT_VERSION = 1
GROUP = "features"


def zarr_zip(bags: Iterable[FeatureBag], about: dict[str, Any], dim: int, scratch: Path) -> Iterator[bytes]:
    """In `features/`: `embeddings` (slices, windows, dim) and, per slice, `series`, `slice`, `z_mm`.

    `series` numbers the lines of `receipts.jsonl` from 0. Chunks leave as they fill; the metadata, which says how many
    there are, comes last, as zarr itself writes it.
    """
    windows = about["windows"]
    rows = max(1, CHUNK_BYTES // (len(windows) * dim * 2))
    arrays = {
        "embeddings": _Chunks("embeddings", np.dtype("<f2"), (rows, len(windows), dim)),
        "series": _Chunks("series", np.dtype("<i4"), (rows,)),
        "slice": _Chunks("slice", np.dtype("<i4"), (rows,)),
        "z_mm": _Chunks("z_mm", np.dtype("<f8"), (rows,)),
    }
    outbox, receipts = Outbox(), Lines(scratch)
    with zipfile.ZipFile(outbox, "w") as archive:
        for number, bag in enumerate(bags):
            slices = len(bag.vectors)
            columns = {
                "embeddings": bag.vectors,
                "series": np.full(slices, number),
                "slice": np.arange(slices),
                "z_mm": np.asarray(bag.receipt["z_mm"]),
            }
            for name, values in columns.items():
                arrays[name].add(values, archive)
            receipts.add(_line(bag))
            yield outbox.take()
        for array in arrays.values():
            array.finish(archive)
        for name, content in _metadata(arrays, {"layout_version": LAYOUT_VERSION, **about}).items():
            archive.writestr(f"{GROUP}/{name}", content)
        yield from receipts.into(archive, "receipts.jsonl", outbox)
    yield outbox.take()


class _Chunks:
    """One array's rows, leaving in chunks of equal shape; the last is filled up with zeros."""

    def __init__(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
        self.name, self.length = name, 0
        self.chunk: NDArray[Any] = np.zeros(shape, dtype)

    def add(self, values: NDArray[Any], archive: zipfile.ZipFile) -> None:
        size = len(self.chunk)
        while len(values):
            start = self.length % size
            part = values[: size - start]
            self.chunk[start : start + len(part)] = part
            self.length += len(part)
            values = values[len(part) :]
            if self.length % size == 0:
                self._write(self.length // size - 1, archive)

    def finish(self, archive: zipfile.ZipFile) -> None:
        if filled := self.length % len(self.chunk):
            self.chunk[filled:] = 0
            self._write(self.length // len(self.chunk), archive)

    def _write(self, number: int, archive: zipfile.ZipFile) -> None:
        place = "/".join([str(number), *["0"] * (self.chunk.ndim - 1)])
        archive.writestr(f"{GROUP}/{self.name}/c/{place}", self.chunk.tobytes())


def _metadata(arrays: dict[str, _Chunks], attributes: dict[str, Any]) -> dict[str, bytes]:
    """Every zarr.json of the group, by its path."""
    import zarr
    from zarr.storage import MemoryStore

    store = MemoryStore()
    group = zarr.create_group(store, attributes=attributes)
    for name, chunks in arrays.items():
        group.create_array(
            name,
            shape=(chunks.length, *chunks.chunk.shape[1:]),
            chunks=chunks.chunk.shape,
            dtype=chunks.chunk.dtype,
            compressors=None,
            dimension_names=("slice", "window", "dim")[: chunks.chunk.ndim],
        )
    return {name: content.to_bytes() for name, content in store._store_dict.items()}


def _line(bag: FeatureBag) -> dict[str, Any]:
    said = ("series_uid", "study_uid", "patient", "body_part", "manufacturer", "model", "kernel", "receipt")
    return {name: getattr(bag, name) for name in said}
