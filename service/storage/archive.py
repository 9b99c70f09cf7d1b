"""The DICOM files as received: `<SeriesInstanceUID>/<SOPInstanceUID>.dcm`, in a directory or a bucket."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from service.errors import Damaged
from service.storage.objects import Objects

# Of a series' instances, or all of them: SHA-256 by SOPInstanceUID, as far as it is known.
Sums = Callable[[str, Sequence[str] | None], Mapping[str, bytes]]

SUFFIX = ".dcm"
SHOWN = 20  # damaged files named in the error


class Archive:
    """Names come from UIDs that screening has checked; nothing else becomes a path."""

    def __init__(self, place: Objects, staging_dir: Path, verify_by: Sums | None = None) -> None:
        """With `verify_by` files are compared with their checksums whenever they are to be read."""
        self._place = place
        self._staging_dir = staging_dir
        self._verify_by = verify_by

    def add(self, series_uid: str, staged: Sequence[tuple[str, Path]]) -> list[bool]:
        """Move files in, by their SOPInstanceUIDs, on disk when this answers; False where an instance is here already.

        Two uploads of one instance may race: one of them is first.
        """
        return self._place.add_files(series_uid, [(f"{sop_uid}{SUFFIX}", path) for sop_uid, path in staged])

    def mend(self, series_uid: str, sop_uid: str, staged: Path, sha256: bytes) -> None:
        """Where the file of this instance no longer has the checksum that the staged one has, the staged one is put in
        its place."""
        try:
            if self.sha256(series_uid, sop_uid) != sha256:
                self._place.replace_file(_name(series_uid, sop_uid), staged)
        except FileNotFoundError:
            pass

    def series(self) -> list[str]:
        """Of which there is a folder."""
        return self._place.names()

    def changed_at(self, series_uid: str) -> float | None:
        """When a file came or went last, in seconds of time.time(); None where nothing of the series is here."""
        return self._place.changed_at(series_uid)

    def sop_uids(self, series_uid: str) -> list[str]:
        names = self._place.names(series_uid)
        return [name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)]

    def sha256(self, series_uid: str, sop_uid: str) -> bytes:
        """Raises FileNotFoundError."""
        with self.local(series_uid, [sop_uid]) as (path,):
            return sha256_of(path)

    @contextmanager
    def reading(self, series_uid: str, sop_uids: Sequence[str] | None = None) -> Iterator[list[Path]]:
        """Files, or all of the series, to be read as long as the block lasts. Raises Damaged where reads are verified
        and one is not what arrived."""
        with self.local(series_uid, sop_uids) as paths:
            self._verify(series_uid, paths, sop_uids)
            yield paths

    @contextmanager
    def local(self, series_uid: str, sop_uids: Sequence[str] | None = None) -> Iterator[list[Path]]:
        """As reading(), verified or not. An instance that is not here has a path without a file."""
        asked = self.sop_uids(series_uid) if sop_uids is None else sop_uids
        with self._place.local([_name(series_uid, each) for each in asked], self._staging_dir) as paths:
            yield paths

    def verify(self, series_uid: str, sop_uids: Sequence[str] | None = None) -> None:
        """Raises Damaged as reading() does, and where it does."""
        if self._verify_by:
            with self.reading(series_uid, sop_uids):
                pass

    def _verify(self, series_uid: str, paths: Sequence[Path], sop_uids: Sequence[str] | None) -> None:
        sums = self._verify_by(series_uid, sop_uids) if self._verify_by else {}
        known = [path for path in paths if path.stem in sums and path.exists()]
        damaged = [path.stem for path in known if sha256_of(path) != sums[path.stem]]
        if damaged:
            found = f"{len(damaged)} of {len(paths)} files are not what arrived (SHA-256)"
            raise Damaged(f"{found}; send the series again", series_uid=series_uid, sop_uids=damaged[:SHOWN])

    def discard(self, series_uid: str, sop_uid: str) -> None:
        self._place.remove(_name(series_uid, sop_uid))

    def remove(self, series_uid: str) -> None:
        """All of the series, for good."""
        self._place.remove(series_uid)

    def content(self, series_uid: str) -> tuple[str, int]:
        """Digest over which instances are here, which changes when slices come later, and their number."""
        sop_uids = self.sop_uids(series_uid)
        return content_of(sop_uids), len(sop_uids)


def _name(series_uid: str, sop_uid: str) -> str:
    return f"{series_uid}/{sop_uid}{SUFFIX}"


def sha256_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def content_of(sop_uids: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(f"{each}{SUFFIX}" for each in sop_uids).encode()).hexdigest()[:16]
