"""The DICOM files as received: `<root>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm`."""

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from models.durable import fsync_path, remove_tree
from service.errors import Damaged
from service.storage.folder import Folder

# Of a series' instances, or all of them: SHA-256 by SOPInstanceUID, as far as it is known.
Sums = Callable[[str, Sequence[str] | None], Mapping[str, bytes]]

SHOWN = 20  # damaged files named in the error


class Archive:
    """Names come from UIDs that screening has checked; nothing else becomes a path."""

    def __init__(self, root: Path, verify_by: Sums | None = None) -> None:
        """With `verify_by` every file is compared with its checksum whenever it is to be read."""
        self._root = root
        self._verify_by = verify_by
        root.mkdir(parents=True, exist_ok=True)

    def add(self, series_uid: str, sop_uid: str, staged: Path) -> bool:
        """Move a file in; False where this instance is already here.

        Two uploads of one instance may race: the link is made by one of them only, and the bytes are
        on disk before it. The caller flushes the folder when all of a series' files are in.
        """
        folder = self._root / series_uid
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            fsync_path(self._root)
        fsync_path(staged)
        try:
            os.link(staged, folder / f"{sop_uid}.dcm")
        except FileExistsError:
            return False
        finally:
            staged.unlink()
        return True

    def mend(self, series_uid: str, sop_uid: str, staged: Path, sha256: bytes) -> None:
        """Where the file of this instance no longer has the checksum that the staged one has, the staged one is put in
        its place."""
        path = self.file(series_uid, sop_uid)
        if not path.exists() or sha256_of(path) == sha256:
            return
        fsync_path(staged)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        os.link(staged, temporary)
        temporary.replace(path)

    def flush(self, series_uid: str) -> None:
        fsync_path(self._root / series_uid)

    def series(self) -> list[str]:
        """Of which there is a folder."""
        return sorted(path.name for path in self._root.iterdir() if path.is_dir())

    def changed_at(self, series_uid: str) -> float | None:
        """When a file came or went last, in seconds of time.time(); None where nothing of the series is here."""
        return Folder(self._root).changed_at(series_uid)

    def files(self, series_uid: str) -> list[Path]:
        return sorted((self._root / series_uid).glob("*.dcm"))

    def file(self, series_uid: str, sop_uid: str) -> Path:
        return self._root / series_uid / f"{sop_uid}.dcm"

    def read_file(self, series_uid: str, sop_uid: str) -> Path:
        """The file, to be read. Raises Damaged where reads are verified and it is not what arrived."""
        path = self.file(series_uid, sop_uid)
        if self._verify_by and path.exists():
            self._verify(series_uid, [path], self._verify_by(series_uid, [sop_uid]))
        return path

    def read_files(self, series_uid: str) -> list[Path]:
        """As files(), to be read. Raises Damaged as read_file() does."""
        paths = self.files(series_uid)
        if self._verify_by:
            self._verify(series_uid, paths, self._verify_by(series_uid, None))
        return paths

    def _verify(self, series_uid: str, paths: Sequence[Path], sums: Mapping[str, bytes]) -> None:
        known = [path for path in paths if path.stem in sums]
        damaged = [path.stem for path in known if sha256_of(path) != sums[path.stem]]
        if damaged:
            found = f"{len(damaged)} of {len(paths)} files are not what arrived (SHA-256)"
            raise Damaged(f"{found}; send the series again", series_uid=series_uid, sop_uids=damaged[:SHOWN])

    def remove(self, series_uid: str) -> None:
        """All of the series, for good."""
        remove_tree(self._root / series_uid)

    def content(self, series_uid: str) -> tuple[str, int]:
        """Digest over which instances are here, which changes when slices come later, and their number."""
        names = [path.name for path in self.files(series_uid)]
        return content_of(names), len(names)


def sha256_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def content_of(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
