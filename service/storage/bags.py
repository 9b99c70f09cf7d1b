"""Zarr: one (slices, windows, dim) float16 array per EmbeddingKey, with its receipt in the attributes."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from models.durable import fsync_path, fsync_tree, remove_tree
from service.errors import Damaged
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

    def __init__(self, root: Path, verify: bool = False) -> None:
        """With `verify` whatever is read is compared with its checksum first."""
        self._root = root
        self._verify = verify
        root.mkdir(parents=True, exist_ok=True)

    def put(self, key: EmbeddingKey, content: str, bag: NDArray[np.float16], receipt: dict[str, Any]) -> None:
        """Write under a temporary name, flush, rename: a reader sees all of it or nothing.

        A bag that is there already stays, unless it is damaged.
        """
        path = self.path(key, content)
        if path.exists():
            if self.damage(key, content) is None:
                return
            aside = path.with_name(f".{content}.{uuid.uuid4().hex}")
            path.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{content}.{uuid.uuid4().hex}")
        array = zarr.create_array(
            temporary, data=bag, chunks=bag.shape, compressors=None, dimension_names=("slice", "window", "dim")
        )
        array.attrs.update({"layout_version": LAYOUT_VERSION, "receipt": receipt, "sha256": _sums(bag, receipt)})
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
        """Raises FileNotFoundError for a bag that was replaced, and Damaged for one that does not read; where reads are
        verified also for one that is not what was written."""
        if self._verify:
            self._refuse_damaged(key, content)
        try:
            return np.asarray(self._open(key, content)[:])
        except FileNotFoundError:
            raise
        except Exception as error:  # zarr raises whatever its decoders do
            raise self._damaged(key, f"it does not read: {type(error).__name__}") from error

    def get_slice(self, key: EmbeddingKey, content: str, number: int) -> NDArray[np.float16]:
        """(windows, dim) of one slice, without reading the others: a bag is one chunk of plain numbers.

        Raises as get() does, and IndexError.
        """
        if self._verify:
            self._refuse_damaged(key, content)
        path = self.path(key, content)
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
        """Where this embedding comes from: encoder, code, slices with UIDs and positions, times. Raises as get()."""
        if self._verify:
            self._refuse_damaged(key, content)
        try:
            receipt: dict[str, Any] = self._open(key, content).attrs["receipt"]  # type: ignore[assignment]
        except FileNotFoundError:
            raise
        except Exception as error:  # as in get()
            raise self._damaged(key, f"it does not read: {type(error).__name__}") from error
        return receipt

    def damage(self, key: EmbeddingKey, content: str) -> str | None:
        """What is wrong with a bag; None where it reads and is what was written.

        Of bags that were written before there were checksums only that it reads. Raises FileNotFoundError.
        """
        if not self.path(key, content).exists():
            raise FileNotFoundError(f"no bag {content}")
        try:
            array = self._open(key, content)
            bag, receipt, sums = np.asarray(array[:]), array.attrs["receipt"], array.attrs.get("sha256")
        except Exception as error:  # zarr raises whatever its decoders do
            return f"it does not read: {type(error).__name__}"
        if not isinstance(receipt, dict) or bag.ndim != 3 or bag.dtype != np.float16:
            return "it is no bag"
        if sums is None:  # Zarr reads a chunk that is not there as zeros
            return "its embeddings are gone" if array.nchunks_initialized < array.nchunks else None
        wrong = [name for name, found in _sums(bag, receipt).items() if not _says(sums, name, found)]
        return f"the SHA-256 of its {' and '.join(wrong)} is another" if wrong else None

    def keep_only(self, key: EmbeddingKey, contents: Collection[str]) -> None:
        """Remove bags of other contents, and what dead writers left behind."""
        kept = {f"{content}.zarr" for content in contents}
        for path in (self._root / key.encoder_id / key.series_uid).iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def everything(self) -> Iterator[tuple[EmbeddingKey, Path]]:
        """Whatever lies where bags lie: what is being written, and what dead writers left, too."""
        for folder in sorted(self._root.glob("*/*")):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                yield EmbeddingKey(folder.name, folder.parent.name), path

    def discard(self, path: Path) -> None:
        """Remove one that everything() named."""
        shutil.rmtree(path, ignore_errors=True)

    def path(self, key: EmbeddingKey, content: str) -> Path:
        return self._root / key.encoder_id / key.series_uid / f"{content}.zarr"

    def count(self, series_uid: str) -> int:
        """Of every encoder, those that were replaced and not yet removed too."""
        return sum(1 for folder in self._folders(series_uid) for _ in folder.glob("*.zarr"))

    def remove(self, series_uid: str) -> None:
        """All of the series, of every encoder, also what is just being written."""
        for folder in self._folders(series_uid):
            remove_tree(folder)

    def _refuse_damaged(self, key: EmbeddingKey, content: str) -> None:
        if (found := self.damage(key, content)) is not None:
            raise self._damaged(key, found)

    def _damaged(self, key: EmbeddingKey, found: str) -> Damaged:
        message = f"a bag is not what was written: {found}"
        return Damaged(message, series_uid=key.series_uid, encoder_id=key.encoder_id)

    def _folders(self, series_uid: str) -> list[Path]:
        return [path for encoder in self._root.iterdir() if (path := encoder / series_uid).is_dir()]

    def _open(self, key: EmbeddingKey, content: str) -> "zarr.Array[Any]":
        return zarr.open_array(self.path(key, content), mode="r")


def _sums(bag: NDArray[np.float16], receipt: dict[str, Any]) -> dict[str, str]:
    """SHA-256 in hexadecimal, of the chunk's bytes and of the receipt as JSON with sorted keys and no spaces."""
    said = json.dumps(receipt, sort_keys=True, separators=(",", ":"))
    chunk = np.ascontiguousarray(bag, "<f2")
    return {
        "embeddings": hashlib.sha256(chunk.tobytes()).hexdigest(),
        "receipt": hashlib.sha256(said.encode()).hexdigest(),
    }


def _says(sums: Any, name: str, found: str) -> bool:
    return isinstance(sums, dict) and sums.get(name) == found
