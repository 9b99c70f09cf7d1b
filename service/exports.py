"""What may be named as an export: directories and archives of this machine, below the allowed roots."""

import os
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from service.archives import BROKEN, Kind, kind_of
from service.errors import BadArchive, BadExport, PathNotAllowed

SCHEMES = ("file",)


def file_uri(path: bytes) -> str:
    """Of an absolute path, of whatever bytes."""
    return f"file://{quote_from_bytes(path)}"


def path_of(uri: str) -> bytes:
    """The absolute path that a file: URI, or a path itself, names. Raises BadExport."""
    parts = urlsplit(uri)
    if uri.startswith("/"):
        path = os.fsencode(uri)
    elif parts.scheme not in SCHEMES:
        found = parts.scheme or "no scheme"
        raise BadExport(f"the URI has {found}, expected an absolute path or one of {', '.join(SCHEMES)}")
    elif parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
        raise BadExport("a file: URI with host, query or fragment, expected file:///path")
    else:
        path = unquote_to_bytes(parts.path)
    if b"\0" in path or not path.startswith(b"/"):
        raise BadExport("the URI names no absolute path")
    return path


def checked_uri(uri: str, roots: str) -> str:
    """The URI without symbolic links, of a directory or archive that is there, below one of the roots.

    Raises PathNotAllowed, which does not tell whether it is there, BadExport, or BadArchive.
    """
    real = Path(os.fsdecode(path_of(uri))).resolve()
    allowed = [Path(os.fsdecode(root)).resolve() for root in parse_roots(roots)]
    if not any(real.is_relative_to(root) for root in allowed):
        if not allowed:
            raise PathNotAllowed("KEYSLICE_EXPORT_ROOTS names no directory: no path of this machine may be named")
        raise PathNotAllowed("the path lies outside the directories of KEYSLICE_EXPORT_ROOTS")
    if real.is_file():
        _check_archive(real)
    elif not real.is_dir():
        raise BadExport("there is nothing at this path, expected a directory or an archive")
    return file_uri(os.fsencode(real))


def parse_roots(roots: str) -> list[bytes]:
    """The directories of KEYSLICE_EXPORT_ROOTS. Raises BadExport for one that is no absolute path."""
    return [path_of(root.strip()) for root in roots.split(",") if root.strip()]


def _check_archive(path: Path) -> None:
    try:
        kind = kind_of(path)
        if kind is Kind.ZIP:
            zipfile.ZipFile(path).close()
        elif kind is Kind.TAR:
            tarfile.open(path).close()
    except PermissionError as error:
        raise BadExport("the archive may not be read by the service") from error
    except BROKEN as error:
        raise BadArchive(f"the archive is broken or truncated: {type(error).__name__}") from error
    if kind is None:
        raise BadExport("the file is neither a zip nor a tar, expected a directory or an archive")
