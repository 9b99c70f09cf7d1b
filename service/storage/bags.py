"""Zarr: one (slices, windows, dim) float16 array per EmbeddingKey, with its receipt in the attributes."""

import hashlib
import json
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from service.errors import Damaged, StorageUnreachable
from service.storage.keys import EmbeddingKey
from service.storage.objects import Objects

LAYOUT_VERSION = 1
METADATA = "zarr.json"  # without it there is no bag
CHUNK = "c/0/0/0"
FLOAT16 = np.dtype("<f2")
TRIES = 3  # at a bag that another writer writes too


def slices_of(receipt: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each row of a bag: slice, sop_uid, frame and z_mm. `frame` counts from 1; None where the file is the slice."""
    rows = len(receipt["sop_uids"])
    columns = receipt["sop_uids"], receipt.get("frames") or [None] * rows, receipt["z_mm"]
    return [
        {"slice": k, "sop_uid": sop_uid, "frame": frame, "z_mm": z_mm}
        for k, (sop_uid, frame, z_mm) in enumerate(zip(*columns, strict=True))
    ]


class Bags:
    """`<encoder_id>/<series_uid>/<content>.zarr`: a bag is never changed once it is there.

    `content` is the archive's digest of the instances it was made from, so slices that come later make
    another bag; the catalog says which one counts. Zarr encodes and decodes in memory: a bag is two small files.
    """

    def __init__(self, objects: Objects, verify: bool = False) -> None:
        """With `verify` whatever is read is compared with its checksum first."""
        self._objects = objects
        self._verify = verify

    def put(self, key: EmbeddingKey, content: str, bag: NDArray[np.float16], receipt: dict[str, Any]) -> None:
        """A reader sees all of it or nothing. A bag that is there already stays, unless it is damaged."""
        name, files = _name(key, content), _encoded(bag, receipt)
        for _ in range(TRIES):
            if self.exists(key, content):
                if self.damage(key, content) is None:
                    return
                self._remove(name)
            if self._objects.add_folder(name, files):
                return
            if not self.exists(key, content):  # part of a bag, by a writer who died or is slower
                self._remove(name)
        raise StorageUnreachable("others write the same bag again and again")

    def get(self, key: EmbeddingKey, content: str) -> NDArray[np.float16]:
        """Raises FileNotFoundError for a bag that was replaced, and Damaged for one that does not read; where reads are
        verified also for one that is not what was written."""
        if self._verify:
            self._refuse_damaged(key, content)
        try:
            return np.asarray(self._open(key, content)[:])
        except (FileNotFoundError, StorageUnreachable):
            raise
        except Exception as error:  # zarr raises whatever its decoders do
            raise self._damaged(key, f"it does not read: {type(error).__name__}") from error

    def get_slice(self, key: EmbeddingKey, content: str, number: int) -> NDArray[np.float16]:
        """(windows, dim) of one slice, without reading the others: a bag is one chunk of plain numbers.

        Raises as get() does, and IndexError.
        """
        if self._verify:
            self._refuse_damaged(key, content)
        name = _name(key, content)
        slices, windows, dim = json.loads(self._objects.read(f"{name}/{METADATA}"))["shape"]
        if not 0 <= number < slices:
            raise IndexError(f"no slice {number}, expected 0 to {slices - 1}")
        length = windows * dim * FLOAT16.itemsize
        try:
            numbers = np.frombuffer(self._objects.read_part(f"{name}/{CHUNK}", number * length, length), FLOAT16)
        except FileNotFoundError:  # Zarr writes no chunk of zeros alone; or the bag is being removed
            return np.asarray(self.get(key, content)[number])
        return np.asarray(numbers, np.float16).reshape(windows, dim)

    def receipt(self, key: EmbeddingKey, content: str) -> dict[str, Any]:
        """Where this embedding comes from: encoder, code, slices with UIDs and positions, times. Raises as get()."""
        if self._verify:
            self._refuse_damaged(key, content)
        try:
            receipt: dict[str, Any] = self._described(key, content).attrs["receipt"]  # type: ignore[assignment]
        except (FileNotFoundError, StorageUnreachable):
            raise
        except Exception as error:  # as in get()
            raise self._damaged(key, f"it does not read: {type(error).__name__}") from error
        return receipt

    def exists(self, key: EmbeddingKey, content: str) -> bool:
        return self._objects.exists(f"{_name(key, content)}/{METADATA}")

    def damage(self, key: EmbeddingKey, content: str) -> str | None:
        """What is wrong with a bag; None where it reads and is what was written.

        Of bags that were written before there were checksums only that it reads. Raises FileNotFoundError.
        """
        if not self.exists(key, content):
            raise FileNotFoundError(f"no bag {content}")
        try:
            array = self._open(key, content)
            bag, receipt, sums = np.asarray(array[:]), array.attrs["receipt"], array.attrs.get("sha256")
        except StorageUnreachable:
            raise
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
        for name in self._objects.names(_folder(key)):
            if name not in kept:
                self.discard(key, name)

    def everything(self) -> Iterator[tuple[EmbeddingKey, str]]:
        """The name of whatever lies where bags lie: what is being written, and what dead writers left, too."""
        for encoder_id in self._objects.names():
            for series_uid in self._objects.names(encoder_id):
                key = EmbeddingKey(series_uid, encoder_id)
                for name in self._objects.names(_folder(key)):
                    yield key, name

    def changed_at(self, key: EmbeddingKey, name: str) -> float | None:
        """When what everything() named came, in seconds of time.time(); None where it is gone."""
        return self._objects.changed_at(f"{_folder(key)}/{name}")

    def discard(self, key: EmbeddingKey, name: str) -> None:
        """Remove what everything() named."""
        self._remove(f"{_folder(key)}/{name}")

    def count(self, series_uid: str) -> int:
        """Of every encoder, those that were replaced and not yet removed too."""
        keys = (EmbeddingKey(series_uid, encoder_id) for encoder_id in self._objects.names())
        return sum(name.endswith(".zarr") for key in keys for name in self._objects.names(_folder(key)))

    def remove(self, series_uid: str) -> None:
        """All of the series, of every encoder, also what is just being written."""
        for encoder_id in self._objects.names():
            key = EmbeddingKey(series_uid, encoder_id)
            for name in self._objects.names(_folder(key)):
                self.discard(key, name)
            self._objects.remove(_folder(key))

    def answers(self) -> bool:
        """Whether the place of the bags can be reached."""
        try:
            self._objects.names()
        except OSError:
            return False
        return True

    def _remove(self, name: str) -> None:
        """What makes it a bag goes first."""
        self._objects.remove(f"{name}/{METADATA}")
        self._objects.remove(name)

    def _refuse_damaged(self, key: EmbeddingKey, content: str) -> None:
        if (found := self.damage(key, content)) is not None:
            raise self._damaged(key, found)

    def _damaged(self, key: EmbeddingKey, found: str) -> Damaged:
        message = f"a bag is not what was written: {found}"
        return Damaged(message, series_uid=key.series_uid, encoder_id=key.encoder_id)

    def _described(self, key: EmbeddingKey, content: str) -> "zarr.Array[Any]":
        """The bag without its numbers."""
        return _array({METADATA: self._objects.read(f"{_name(key, content)}/{METADATA}")})

    def _open(self, key: EmbeddingKey, content: str) -> "zarr.Array[Any]":
        name = _name(key, content)
        files = {METADATA: self._objects.read(f"{name}/{METADATA}")}
        try:
            files[CHUNK] = self._objects.read(f"{name}/{CHUNK}")
        except FileNotFoundError:  # Zarr writes no chunk of zeros alone; or the bag has just been removed
            if not self.exists(key, content):
                raise
        return _array(files)


def _folder(key: EmbeddingKey) -> str:
    return f"{key.encoder_id}/{key.series_uid}"


def _name(key: EmbeddingKey, content: str) -> str:
    return f"{_folder(key)}/{content}.zarr"


def _encoded(bag: NDArray[np.float16], receipt: dict[str, Any]) -> dict[str, bytes]:
    """A bag's files by name, its metadata last."""
    files: dict[str, Any] = {}
    array = zarr.create_array(
        MemoryStore(files), data=bag, chunks=bag.shape, compressors=None, dimension_names=("slice", "window", "dim")
    )
    array.attrs.update({"layout_version": LAYOUT_VERSION, "receipt": receipt, "sha256": _sums(bag, receipt)})
    return {name: files[name].to_bytes() for name in (CHUNK, METADATA) if name in files}


def _array(files: dict[str, bytes]) -> "zarr.Array[Any]":
    store = MemoryStore({name: cpu.Buffer.from_bytes(content) for name, content in files.items()}, read_only=True)
    return zarr.open_array(store, mode="r")


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
