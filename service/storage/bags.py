"""Zarr: one (slices, windows, dim) float16 array per EmbeddingKey, with its receipt in the attributes."""

import json
import shutil
import uuid
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from models.durable import fsync_path, fsync_tree, remove_tree
from service.storage.keys import EmbeddingKey

LAYOUT_VERSION = 1
FLOAT16 = np.dtype("<f2")


def slices_of(receipt: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each row of a bag: slice, sop_uid, frame and z_mm. `frame` counts from 1; None where the file is the slice."""
    rows = len(receipt["sop_uids"])
    columns = receipt["sop_uids"], receipt.get("frames") or [None] * rows, receipt["z_mm"]
    return [
        {"slice": k, "sop_uid": sop_uid, "frame": frame, "z_mm": z_mm}
        for k, (sop_uid, frame, z_mm) in enumerate(zip(*columns, strict=True))
    ]


class Bags:
    """`<root>/<encoder_id>/<series_uid>/<content>.zarr`: a bag is never changed once it is there.

    `content` is the archive's digest of the instances it was made from, so slices that come later make
    another bag; the catalog says which one counts.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, key: EmbeddingKey, content: str, bag: NDArray[np.float16], receipt: dict[str, Any]) -> None:
        """Write under a temporary name, flush, rename: a reader sees all of it or nothing."""
        path = self._path(key, content)
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{content}.{uuid.uuid4().hex}")
        array = zarr.create_array(
            temporary, data=bag, chunks=bag.shape, compressors=None, dimension_names=("slice", "window", "dim")
        )
        array.attrs.update({"layout_version": LAYOUT_VERSION, "receipt": receipt})
        fsync_tree(temporary)
        try:
            temporary.rename(path)
        except OSError:  # another worker's bag of the same content came first
            shutil.rmtree(temporary)
            if not path.exists():
                raise
        fsync_path(path.parent)
        fsync_path(path.parent.parent)
        fsync_path(self._root)

    def get(self, key: EmbeddingKey, content: str) -> NDArray[np.float16]:
        """Raises FileNotFoundError for a bag that was replaced."""
        return np.asarray(self._open(key, content)[:])

    def get_slice(self, key: EmbeddingKey, content: str, number: int) -> NDArray[np.float16]:
        """(windows, dim) of one slice, without reading the others: a bag is one chunk of plain numbers.

        Raises FileNotFoundError as get() does, and IndexError.
        """
        path = self._path(key, content)
        slices, windows, dim = json.loads((path / "zarr.json").read_bytes())["shape"]
        if not 0 <= number < slices:
            raise IndexError(f"no slice {number}, expected 0 to {slices - 1}")
        try:
            with (path / "c" / "0" / "0" / "0").open("rb") as chunk:
                chunk.seek(number * windows * dim * FLOAT16.itemsize)
                numbers = np.frombuffer(chunk.read(windows * dim * FLOAT16.itemsize), FLOAT16)
                return np.asarray(numbers, np.float16).reshape(windows, dim)
        except FileNotFoundError:  # Zarr writes no chunk of zeros alone; or the bag is being removed
            return np.asarray(self.get(key, content)[number])

    def receipt(self, key: EmbeddingKey, content: str) -> dict[str, Any]:
        """Where this embedding comes from: encoder, code, slices with UIDs and positions, times."""
        receipt: dict[str, Any] = self._open(key, content).attrs["receipt"]  # type: ignore[assignment]
        return receipt

    def keep_only(self, key: EmbeddingKey, contents: Collection[str]) -> None:
        """Remove bags of other contents, and what dead writers left behind."""
        kept = {f"{content}.zarr" for content in contents}
        for path in (self._root / key.encoder_id / key.series_uid).iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def count(self, series_uid: str) -> int:
        """Of every encoder, those that were replaced and not yet removed too."""
        return sum(1 for folder in self._folders(series_uid) for _ in folder.glob("*.zarr"))

    def remove(self, series_uid: str) -> None:
        """All of the series, of every encoder, also what is just being written."""
        for folder in self._folders(series_uid):
            remove_tree(folder)

    def _folders(self, series_uid: str) -> list[Path]:
        return [path for encoder in self._root.iterdir() if (path := encoder / series_uid).is_dir()]

    def _path(self, key: EmbeddingKey, content: str) -> Path:
        return self._root / key.encoder_id / key.series_uid / f"{content}.zarr"

    def _open(self, key: EmbeddingKey, content: str) -> "zarr.Array[Any]":
        return zarr.open_array(self._path(key, content), mode="r")
