"""Members of a zip or tar as staged files: streamed, bounded, and never outside their directory."""

import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import IO

from models.ct.nifti import is_nifti
from service.disk import Room
from service.errors import BadArchive, UploadTooLarge
from service.uploads import StagedFile

# Below this an archive may expand as it likes: empty slices of a small series compress a thousandfold.
EXPANSION_FLOOR_BYTES = 256 * 2**20
COPY_BYTES = 1 << 20


BROKEN = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, NotImplementedError)


class Kind(Enum):
    ZIP = "zip"
    TAR = "tar"  # plain, gz, bz2 or xz


@dataclass
class Budget:
    """What one upload may still unpack."""

    files: int
    bytes: int
    room: Room | None = None  # where it goes, if anywhere

    def take_file(self) -> None:
        self.files -= 1
        if self.files < 0:
            raise UploadTooLarge("more files in the upload than its limit")

    def take_bytes(self, count: int) -> None:
        self.bytes -= count
        if self.bytes < 0:
            raise BadArchive("the archive expands beyond its limit")
        if self.room:
            self.room.require(count)


def unpacked(
    staged: StagedFile, folder: Path, room: Room, max_files: int, max_expansion: float
) -> Iterator[StagedFile]:
    """The file itself, or where it is a zip or tar (plain, gz, bz2, xz) each member of it.

    Archives inside archives are not opened. Raises BadArchive, UploadTooLarge or NoRoom.
    """
    budget = Budget(max_files, most_expanded(staged.path, max_expansion), room)
    members = {Kind.ZIP: _zip_members, Kind.TAR: _tar_members}
    if kind := kind_of(staged.path):
        yield from _members(members[kind](staged.path), folder, budget)
    else:
        yield staged


def kind_of(path: Path) -> Kind | None:
    """What the file's bytes say, whatever its name; None for what is no archive."""
    if zipfile.is_zipfile(path) or _starts_like_zip(path):
        return Kind.ZIP
    return Kind.TAR if not is_nifti(path) and _is_tar(path) else None


def most_expanded(path: Path, max_expansion: float) -> int:
    """Bytes that the file may become."""
    return max(EXPANSION_FLOOR_BYTES, int(path.stat().st_size * max_expansion))


def _members(members: Iterator[tuple[str, IO[bytes]]], folder: Path, budget: Budget) -> Iterator[StagedFile]:
    try:
        for number, (name, source) in enumerate(members):
            budget.take_file()
            path = folder / f"member-{number}"
            with path.open("wb") as target:
                while chunk := source.read(COPY_BYTES):
                    budget.take_bytes(len(chunk))
                    target.write(chunk)
            yield StagedFile(path, name)
    except RuntimeError as error:  # zipfile's word for an encrypted member
        raise BadArchive("the archive is encrypted, expected a readable one") from error
    except BROKEN as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a full disk is no fault of the archive; decompressors raise OSError without a number
        raise BadArchive(f"the archive is broken or truncated: {type(error).__name__}") from error


def _zip_members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            _refuse_escape(member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise BadArchive("the archive holds a symbolic link, expected files only")
            if not member.is_dir():
                with archive.open(member) as source:
                    yield member.filename, source


def _tar_members(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    with tarfile.open(path) as archive:
        for member in archive:
            _refuse_escape(member.name)
            if member.isdir():
                continue
            source = archive.extractfile(member) if member.isfile() else None
            if source is None:
                raise BadArchive("the archive holds a link or device, expected files only")
            yield member.name, source


def _refuse_escape(name: str) -> None:
    """Nothing is ever written under a member's own name; one that tries to leave is refused all the same."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise BadArchive("a member's name leads out of the archive's directory")


def _starts_like_zip(path: Path) -> bool:
    """A truncated zip has lost its directory, which is what zipfile looks for."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _is_tar(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(512)
    compressed = start.startswith((b"\x1f\x8b", b"\xfd7zXZ\x00", b"BZh"))
    return compressed or start[257:262] == b"ustar" or (start[128:132] != b"DICM" and _opens_as_tar(path))


def _opens_as_tar(path: Path) -> bool:
    try:
        tarfile.open(path).close()
        return True
    except (tarfile.TarError, OSError, EOFError):
        return False
