"""A file that is only ever written forwards, and sent on piece by piece while it grows."""

import io
import json
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LINES_IN_MEMORY = 2**20  # bytes; beyond them, receipts on their way wait on the disk
BLOCK = 2**20  # bytes


class Outbox(io.RawIOBase):
    """What was written since it was last taken is in memory, nothing else."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._written = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._written += len(piece)
        return len(piece)

    def tell(self) -> int:
        return self._written

    def seek(self, offset: int, whence: int = 0) -> int:
        raise io.UnsupportedOperation("an outbox goes forwards only")

    def take(self) -> bytes:
        taken, self._pieces = b"".join(self._pieces), []
        return taken


class Lines:
    """Receipts as JSON lines, kept until the zip that they end up in has room for them."""

    def __init__(self, scratch: Path) -> None:
        self._file = tempfile.SpooledTemporaryFile(LINES_IN_MEMORY, dir=str(scratch))  # noqa: SIM115, closed by into()

    def add(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def into(self, archive: zipfile.ZipFile, name: str, outbox: Outbox) -> Iterator[bytes]:
        self._file.seek(0)
        with self._file, archive.open(name, "w", force_zip64=True) as member:
            while block := self._file.read(BLOCK):
                member.write(block)
                yield outbox.take()
