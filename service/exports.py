"""What may be named as an export: directories and archives of this machine, below the allowed roots."""

import os
import tarfile
import zipfile
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from service.archives import BROKEN, Kind, kind_of
from service.errors import BadArchive, BadExport, PathNotAllowed
from service.remotes import BadAddress, Remote, is_remote, parse_remote

SCHEMES = ("file", "s3", "dicomweb+http", "dicomweb+https")


def file_uri(path: bytes) -> str:
    """Of an absolute path, of whatever bytes."""
    return f"file://{quote_from_bytes(path)}"


def path_of(uri: str) -> bytes:
    """The absolute path that a file: URI, or a path itself, names. Raises BadExport."""
    parts = urlsplit(uri)
    if uri.startswith("/"):
        path = os.fsencode(uri)
    elif parts.scheme != "file":
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
    """The URI in its one spelling, below one of the roots: a server, a bucket, or a directory or archive that is there.

    A path comes without symbolic links. Raises PathNotAllowed, which does not tell whether it is there, BadExport,
    or BadArchive.
    """
    paths, remotes = parse_roots(roots)
    if is_remote(uri):
        return _checked_remote(uri, remotes)
    real = Path(os.fsdecode(path_of(uri))).resolve()
    allowed = [Path(os.fsdecode(root)).resolve() for root in paths]
    if not any(real.is_relative_to(root) for root in allowed):
        if not allowed:
            raise PathNotAllowed("KEYSLICE_EXPORT_ROOTS names no directory: no path of this machine may be named")
        raise PathNotAllowed("the path lies outside the directories of KEYSLICE_EXPORT_ROOTS")
    if real.is_file():
        _check_archive(real)
    elif not real.is_dir():
        raise BadExport("there is nothing at this path, expected a directory or an archive")
    return file_uri(os.fsencode(real))


def parse_roots(roots: str) -> tuple[list[bytes], list[Remote]]:
    """The directories of KEYSLICE_EXPORT_ROOTS, and the servers and buckets. Raises BadExport for what is neither."""
    named = [root.strip() for root in roots.split(",") if root.strip()]
    paths = [path_of(root) for root in named if not is_remote(root)]
    return paths, [_remote(root) for root in named if is_remote(root)]


def _checked_remote(uri: str, roots: list[Remote]) -> str:
    place = _remote(uri)
    if not any(place.within(root) for root in roots):
        raise PathNotAllowed("KEYSLICE_EXPORT_ROOTS names no such server or bucket, or another part of it")
    return str(place)


def _remote(uri: str) -> Remote:
    try:
        return parse_remote(uri)
    except BadAddress as error:
        raise BadExport(str(error)) from None


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
