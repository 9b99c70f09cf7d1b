"""Where the files of an export come from: a source lists them, says which series each is of, and fetches it."""

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from models.ct.reasons import Reason
from models.ct.screening import SetAside, series_of
from models.spawn import SPAWN, end_with_parent
from service.errors import CredentialsRefused, SourceAway, SourceFailed, SourceNotFound
from service.storage.files import ExportFile

COPY_BYTES = 1 << 20
DEEPEST = 100  # folders in each other; each that is open takes a file descriptor
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not be waited for

T = TypeVar("T")
U = TypeVar("U")


class Source(Protocol):
    """What an export needs of a directory, an archive, a bucket or a server. Nothing lists all files at once."""

    @property
    def at_once(self) -> int:
        """How many files are best fetched at once."""

    def entries(self) -> Iterator[ExportFile]:
        """Every file, in any order; one whose series or reason is known already says so."""

    def executor(self, processes: int) -> Executor:
        """What identify() runs in: processes where it computes, threads where it waits."""

    def identify(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        """The same files with their series, or with the reason why they are not used."""

    def fetch(self, file: ExportFile, target: Path) -> None:
        """Write the file's bytes to a new file. Raises NotFetched; an OSError is the target's."""


class SupportsRead(Protocol):
    def read(self, size: int, /) -> bytes: ...


class NotFetched(Exception):
    """Why a file of an export cannot be copied."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def in_threads(call: Callable[[T], U], items: Iterable[T], at_once: int) -> Iterator[U]:
    """What the call answers of each item, in their order. Once one has raised, none is begun any more."""
    threads = ThreadPoolExecutor(at_once)
    try:
        yield from threads.map(call, items)
    finally:
        threads.shutdown(cancel_futures=True)


@contextmanager
def of_one_file() -> Iterator[None]:
    """A remote's failure to give one file as NotFetched; one that concerns every file stays what it is."""
    try:
        yield
    except (CredentialsRefused, SourceAway):
        raise
    except SourceFailed as error:
        gone = isinstance(error, SourceNotFound)
        raise NotFetched(Reason.VANISHED if gone else Reason.UNREADABLE_FILE, str(error)) from None


class Tree:
    """A directory, read by descriptors: no symbolic link is followed, nor one that takes a folder's place later."""

    at_once = 1

    def __init__(self, root: bytes) -> None:
        self._root = root  # absolute, without links

    def entries(self) -> Iterator[ExportFile]:
        return _walk(_open_folder(self._root), b"", 0)

    def executor(self, processes: int) -> Executor:
        return ProcessPoolExecutor(processes, SPAWN, end_with_parent)

    def identify(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        found = []
        for folder, inside in groupby(files, key=lambda file: file.name.rpartition(b"/")[0]):
            try:
                opened = _open_folder(self._root + b"/" + folder)
            except OSError as error:
                found += [_unreadable(file, error) for file in inside]
                continue
            try:
                found += [_identified(opened, file) for file in inside]
            finally:
                os.close(opened)
        return found

    def fetch(self, file: ExportFile, target: Path) -> None:
        folder, _, name = file.name.rpartition(b"/")
        try:
            source = _open_file(_open_folder(self._root + b"/" + folder), name, close=True)
        except OSError as error:
            reason, detail = _why(error)
            raise NotFetched(reason, detail) from error
        with source:
            before = _version(source)
            copy(source, target)
            if _version(source) != before:
                raise NotFetched(Reason.CHANGED, "the file was written while it was copied")


def identified(file: ExportFile, source: BinaryIO) -> ExportFile:
    """The file with the series, or the reason, that its header gives."""
    found = series_of(source)
    if isinstance(found, SetAside):
        return file.aside(found.reason, found.detail, found.series_uid)
    return file._replace(series_uid=found)


def copy(source: SupportsRead, target: Path) -> int:
    """Write the rest of an open file to a new one; how many bytes. Raises NotFetched where the source does not read."""
    written = 0
    with target.open("xb") as file:
        while True:
            try:
                chunk = source.read(COPY_BYTES)
            except OSError as error:
                raise NotFetched(Reason.UNREADABLE_FILE, _strerror(error)) from error
            if not chunk:
                return written
            written += file.write(chunk)


def _walk(folder: int, prefix: bytes, depth: int) -> Iterator[ExportFile]:
    """Every file below an open folder, which is closed in the end."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + os.fsencode(entry.name)
                try:
                    yield from _entry(entry, folder, name, depth)
                except OSError as error:  # gone, or not permitted
                    yield _unreadable(ExportFile(name, 0), error)
    except OSError as error:
        yield _unreadable(ExportFile(prefix, 0), error)
    finally:
        os.close(folder)


def _entry(entry: "os.DirEntry[str]", folder: int, name: bytes, depth: int) -> Iterator[ExportFile]:
    if entry.is_symlink():
        yield ExportFile(name, 0).aside(Reason.SYMLINK, "a symbolic link, which is not followed")
    elif entry.is_file():
        yield ExportFile(name, entry.stat().st_size)
    elif not entry.is_dir():
        yield ExportFile(name, 0).aside(Reason.NOT_A_FILE, "a socket, pipe or device, expected a file")
    elif depth == DEEPEST:
        yield ExportFile(name, 0).aside(Reason.NOT_A_FILE, f"more than {DEEPEST} folders deep")
    else:
        yield from _walk(os.open(entry.name, FOLDER, dir_fd=folder), name + b"/", depth + 1)


def _identified(folder: int, file: ExportFile) -> ExportFile:
    try:
        with _open_file(folder, file.name.rpartition(b"/")[2]) as source:
            return identified(file, source)
    except OSError as error:
        return _unreadable(file, error)


def _open_folder(path: bytes) -> int:
    """A descriptor of an absolute path, none of whose components is a symbolic link."""
    folder = os.open(b"/", FOLDER)
    for part in path.split(b"/"):
        if part:
            outer, folder = folder, -1
            try:
                folder = os.open(part, FOLDER, dir_fd=outer)
            finally:
                os.close(outer)
    return folder


def _open_file(folder: int, name: bytes, *, close: bool = False) -> BinaryIO:
    try:
        descriptor = os.open(name, FILE, dir_fd=folder)
    finally:
        if close:
            os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
    return os.fdopen(descriptor, "rb")


def _version(file: BinaryIO) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def _unreadable(file: ExportFile, error: OSError) -> ExportFile:
    return file.aside(*_why(error))


def _why(error: OSError) -> tuple[Reason, str]:
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return Reason.VANISHED, "the file is no longer there"
    if error.errno in (errno.ELOOP, errno.EMLINK):
        return Reason.SYMLINK, "a symbolic link, which is not followed"
    if error.errno == errno.ENXIO:
        return Reason.NOT_A_FILE, "a socket, pipe or device, expected a file"
    return Reason.UNREADABLE_FILE, _strerror(error)


def _strerror(error: OSError) -> str:
    """Without the file's name, which str(error) has."""
    return os.strerror(error.errno) if error.errno else type(error).__name__
