"""The DICOM files as received: `<root>/<SeriesInstanceUID>/<SOPInstanceUID>.dcm`."""

import hashlib
import os
from pathlib import Path

from models.durable import fsync_path, remove_tree


class Archive:
    """Names come from UIDs that screening has checked; nothing else becomes a path."""

    def __init__(self, root: Path) -> None:
        self._root = root
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

    def flush(self, series_uid: str) -> None:
        fsync_path(self._root / series_uid)

    def files(self, series_uid: str) -> list[Path]:
        return sorted((self._root / series_uid).glob("*.dcm"))

    def file(self, series_uid: str, sop_uid: str) -> Path:
        return self._root / series_uid / f"{sop_uid}.dcm"

    def remove(self, series_uid: str) -> None:
        """All of the series, for good."""
        remove_tree(self._root / series_uid)

    def content(self, series_uid: str) -> tuple[str, int]:
        """Digest over which instances are here, which changes when slices come later, and their number."""
        names = [path.name for path in self.files(series_uid)]
        return content_of(names), len(names)


def content_of(names: list[str]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
