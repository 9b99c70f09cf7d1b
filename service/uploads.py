"""A multipart upload, streamed to files on disk: no part is ever held in memory."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool

from service.disk import Room
from service.errors import BadUpload, EmptyUpload, UploadTooLarge

FIELD = "files"
WRITE_BYTES = 1 << 20  # handed to a thread at a time: disks like it, and the event loop stays free


@dataclass(frozen=True)
class StagedFile:
    path: Path
    name: str  # as the sender called it; only ever shown back to the sender


async def receive_files(
    stream: AsyncIterator[bytes], content_type: str, folder: Path, room: Room, *, max_files: int
) -> list[StagedFile]:
    """The parts named `files` of a multipart/form-data body, written below folder. Raises BadUpload or NoRoom."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or b"boundary" not in options:
        raise BadUpload(f"Content-Type is {kind.decode('latin-1') or 'missing'}, expected multipart/form-data")
    parts = await receive_parts(stream, options[b"boundary"], folder, _form_file, room, max_files=max_files)
    if not any(file.path.stat().st_size for file in parts):
        raise EmptyUpload(f"no file with content in the upload, expected one or more parts named {FIELD!r}")
    # An empty part without a name is a browser's field that nobody filled.
    return [file for file in parts if file.path.stat().st_size or file.name != file.path.name]


def _form_file(headers: Mapping[bytes, bytes]) -> str:
    _, options = parse_options_header(headers.get(b"content-disposition", b""))
    name = options.get(b"name", b"").decode("utf-8", "replace")
    if name != FIELD:
        raise BadUpload(f"part named {name!r}, expected {FIELD!r}")
    return options.get(b"filename", b"").decode("utf-8", "replace")


async def receive_parts(
    stream: AsyncIterator[bytes],
    boundary: bytes,
    folder: Path,
    name: Callable[[Mapping[bytes, bytes]], str],
    room: Room,
    *,
    max_files: int,
) -> list[StagedFile]:
    """The parts of any multipart body, written below folder, empty ones too.

    `name` says what a part's headers call it, nothing for one without a name, and raises where they are wrong.
    Raises also BadUpload, UploadTooLarge and NoRoom.
    """
    buffer = bytearray()
    with _writing(folder, boundary, name, max_files) as writer:
        async for chunk in stream:
            buffer += chunk
            if len(buffer) >= WRITE_BYTES:
                room.require(len(buffer))
                await run_in_threadpool(writer.write, bytes(buffer))
                buffer.clear()
        room.require(len(buffer))
        await run_in_threadpool(writer.write, bytes(buffer))
    return writer.files


def save_parts(chunks: Iterable[bytes], boundary: bytes, folder: Path, *, max_files: int) -> list[StagedFile]:
    """The parts of a multipart body that another server answers, written below folder. Raises as receive_parts does."""
    with _writing(folder, boundary, lambda _: "", max_files) as writer:
        for chunk in chunks:
            writer.write(chunk)
    return writer.files


@contextmanager
def _writing(
    folder: Path, boundary: bytes, name: Callable[[Mapping[bytes, bytes]], str], max_files: int
) -> "Iterator[_PartWriter]":
    """A writer that is closed in the end. Raises BadUpload where what was written is no whole multipart body."""
    writer = _PartWriter(folder, boundary, name, max_files)
    try:
        yield writer
    except MultipartParseError as error:
        raise BadUpload(f"malformed multipart body: {error}") from error
    finally:
        writer.close()
    if not writer.complete:
        raise BadUpload("the multipart body ends before its closing boundary")


class _PartWriter:
    """What the parser calls back: opens a file per part, writes its bytes, closes it."""

    def __init__(
        self, folder: Path, boundary: bytes, name: Callable[[Mapping[bytes, bytes]], str], max_files: int
    ) -> None:
        self.files: list[StagedFile] = []
        self.complete = False
        self._folder = folder
        self._name = name
        self._max_files = max_files
        self._header_name = b""
        self._header_value = b""
        self._headers: dict[bytes, bytes] = {}
        self._file: BinaryIO | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._open,
                "on_part_data": self._data,
                "on_part_end": self.close,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        if data:
            self._parser.write(data)

    def close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._headers = {}

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _open(self) -> None:
        name = self._name(self._headers)
        if len(self.files) >= self._max_files:
            raise UploadTooLarge(f"more than {self._max_files} files in one upload")
        path = self._folder / f"part-{len(self.files)}"
        self.files.append(StagedFile(path, name or path.name))
        self._file = path.open("wb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._file:
            self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self.complete = True
