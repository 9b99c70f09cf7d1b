"""Zip and tar archives as sources of an export, read where they lie."""

import bz2
import gzip
import io
import lzma
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from models.ct.reasons import Reason
from service.archives import BROKEN, Budget, most_expanded
from service.disk import Room
from service.errors import BadArchive
from service.storage.files import ExportFile
from workers.sources import COPY_BYTES, NotFetched, copy, identified

HEADER_BYTES = 1 << 16  # that hold what identifies a file, nearly always

COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}


class Zip:
    """Its members, by its directory, which zipfile holds in memory: half a kilobyte for each."""

    at_once = 1

    def __init__(self, path: Path, max_expansion: float) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except BROKEN as error:
            raise _broken(error) from error
        self._members = {member.header_offset: member for member in self._archive.infolist()}
        self._budget = Budget(len(self._members), most_expanded(path, max_expansion))

    def entries(self) -> Iterator[ExportFile]:
        for place, member in self._members.items():
            file = ExportFile(_encoded(member.filename), member.file_size, place)
            if stat.S_ISLNK(member.external_attr >> 16):
                yield file.aside(Reason.SYMLINK, "a symbolic link, which is not followed")
            elif member.flag_bits & 1:
                yield file.aside(Reason.UNREADABLE_FILE, "encrypted")
            elif not member.is_dir():
                yield file

    def executor(self, processes: int) -> Executor:
        return ThreadPoolExecutor(1)  # zipfile reads one member at a time

    def identify(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        return [self._identified(file) for file in files]

    def fetch(self, file: ExportFile, target: Path) -> None:
        try:
            with self._open(file) as source:
                self._budget.take_bytes(copy(source, target))
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise NotFetched(Reason.UNREADABLE_FILE, _unpacking(error)) from error

    def _open(self, file: ExportFile) -> Any:
        return self._archive.open(self._members[file.place])

    def _identified(self, file: ExportFile) -> ExportFile:
        try:
            with self._open(file) as source:
                found = identified(file, io.BytesIO(source.read(HEADER_BYTES)))
            if found.reason and file.size > HEADER_BYTES:
                with self._open(file) as source:
                    found = identified(file, source)
        except BROKEN as error:
            return file.aside(Reason.UNREADABLE_FILE, _unpacking(error))
        return found


class Tar:
    """Its members, by their places in it; a compressed tar is unpacked to a plain one first."""

    at_once = 1

    def __init__(self, path: Path, folder: Path, max_expansion: float, room: Room | None = None) -> None:
        self._path = _plain(path, folder, max_expansion, room)

    def entries(self) -> Iterator[ExportFile]:
        try:
            with tarfile.open(self._path, "r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # which would grow with every member
                    if not member.isdir():
                        yield _entry(member)
        except BROKEN as error:
            raise _broken(error) from error

    def executor(self, processes: int) -> Executor:
        return ThreadPoolExecutor(processes)

    def identify(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        with self._path.open("rb") as archive:
            return [identified(file, io.BufferedReader(_Part(archive, file))) for file in files]

    def fetch(self, file: ExportFile, target: Path) -> None:
        with self._path.open("rb", buffering=0) as archive:
            copied = copy(_Part(archive, file), target)
        if copied != file.size:
            raise NotFetched(Reason.UNREADABLE_FILE, f"{copied} bytes in the archive, expected {file.size}")


class _Part(io.RawIOBase):
    """The bytes of a member of a plain tar."""

    name = ""  # pydicom asks every buffered reader for it

    def __init__(self, archive: BinaryIO, file: ExportFile) -> None:
        self._archive, self._file, self._at = archive, file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._archive.seek(self._file.place + self._at)
        chunk = self._archive.read(max(0, min(len(buffer), self._file.size - self._at)))
        buffer[: len(chunk)] = chunk
        self._at += len(chunk)
        return len(chunk)


def _entry(member: tarfile.TarInfo) -> ExportFile:
    file = ExportFile(_encoded(member.name), member.size, member.offset_data)
    if member.issym():
        return file.aside(Reason.SYMLINK, "a symbolic link, which is not followed")
    if not member.isfile() or member.issparse():
        return file.aside(Reason.NOT_A_FILE, "a link, device or sparse file inside an archive, expected a plain file")
    return file


def _plain(path: Path, folder: Path, max_expansion: float, room: Room | None) -> Path:
    """The tar itself, or what it unpacks to, in the folder. Raises BadArchive or NoRoom."""
    with path.open("rb") as file:
        start = file.read(max(map(len, COMPRESSED)))
    opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return path
    budget = Budget(1, most_expanded(path, max_expansion), room)
    plain = folder / "archive.tar"
    try:
        with opener(path) as source, plain.open("xb") as target:
            while chunk := source.read(COPY_BYTES):
                budget.take_bytes(len(chunk))
                target.write(chunk)
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk is no fault of the archive
        raise _broken(error) from error
    return plain


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _unpacking(error: Exception) -> str:
    return f"{type(error).__name__} while unpacking it"


def _broken(error: Exception) -> BadArchive:
    return BadArchive(f"the archive is broken or truncated: {type(error).__name__}")
