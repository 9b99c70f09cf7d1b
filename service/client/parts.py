"""Files on their way out: read from the disk as they are sent, one open at a time."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias

FIELD = "files"
MEDIA_TYPE = "application/octet-stream"

Files: TypeAlias = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Progress: TypeAlias = Callable[[int, int], object]  # bytes so far, of bytes in all
FormPart: TypeAlias = tuple[str, tuple[str, "Part", str]]


class Part:
    """What httpx needs of a file, whose descriptor lives only while it is read: a folder may have any number."""

    def __init__(self, path: Path, told: Callable[[int], object]) -> None:
        self._path, self._told = path, told
        self._size = path.stat().st_size
        self._at = 0
        self._file: BinaryIO | None = None

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.close()
        self._told(-self._at)
        self._at = 0
        return self._size if whence == os.SEEK_END else offset

    def tell(self) -> int:
        return 0

    def read(self, size: int) -> bytes:
        if self._file is None:
            self._file = self._path.open("rb")
        piece = self._file.read(size)
        if not piece:
            self.close()
        self._at += len(piece)
        self._told(len(piece))
        return piece

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None


def parts_of(files: Files, progress: Progress | None) -> list[FormPart]:
    """A part per file; of a folder every file below it, named from there. Raises FileNotFoundError."""
    paths = [Path(files)] if isinstance(files, str | os.PathLike) else [Path(each) for each in files]
    found = [pair for path in paths for pair in _below(path)]
    if not found:
        raise FileNotFoundError(f"no file in the {len(paths)} places given")
    total = sum(path.stat().st_size for path, _ in found)
    sent = 0

    def told(size: int) -> None:
        nonlocal sent
        sent += size
        if progress and size:
            progress(sent, total)

    return [(FIELD, (name, Part(path, told), MEDIA_TYPE)) for path, name in found]


def close(parts: Sequence[FormPart]) -> None:
    """Whatever an upload that failed has left open."""
    for _, (_, part, _) in parts:
        part.close()


def _below(path: Path) -> list[tuple[Path, str]]:
    if not path.is_dir():
        path.stat()
        return [(path, _readable(path.name))]
    return [(each, _readable(each.relative_to(path).as_posix())) for each in sorted(path.rglob("*")) if each.is_file()]


def _readable(name: str) -> str:
    """Bytes of a file's name that are no UTF-8 as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
