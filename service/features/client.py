"""`keyslice features`: a running service's features, written to a file here."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from models.durable import fsync_path
from service.calling import streamed
from service.features.formats import FORMATS, FormatName

# Of a wait for the next bytes: an .h5ad is made whole before its first byte leaves.
TIMEOUT = httpx.Timeout(30, read=3600)


def format_of(path: Path) -> FormatName | None:
    """By the file's name, by its longest ending that is a format's; None where that says nothing."""
    named = sorted(FORMATS.items(), key=lambda item: -len(item[1].suffix))
    return next((name for name, form in named if path.name.endswith(form.suffix)), None)


def download(http: httpx.Client, query: Mapping[str, Any], path: Path, console: Console) -> dict[str, Any]:
    """Write the cohort to `path`: all of it, or nothing. Raises CallFailed or OSError."""
    with replacing(path) as file, streamed(http, "/v1/features", query, TIMEOUT) as response:
        bar = TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
        with Progress(*bar, console=console) as progress:
            task = progress.add_task(f"{response.headers['X-Keyslice-Series']} series", total=None)
            for piece in response.iter_bytes():
                file.write(piece)
                progress.advance(task, len(piece))
        size = file.tell()
    said = response.headers
    return {
        "path": str(path),
        "bytes": size,
        "encoder_id": said["X-Keyslice-Encoder"],
        "windows": said["X-Keyslice-Windows"].split(","),
        "series": int(said["X-Keyslice-Series"]),
        "slices": int(said["X-Keyslice-Slices"]),
    }


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file under a temporary name beside `path`; at the end it is flushed and renamed, after an error removed."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.rename(path)
        fsync_path(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
