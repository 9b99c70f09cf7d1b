"""Addresses that an export may be read from over the network: a DICOMweb server, a prefix of an S3 bucket."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")  # and no ARN of another account's
LONGEST = 2000  # characters
EXPECTED = "expected dicomweb+https://host/path or s3://bucket/prefix"


class BadAddress(ValueError):
    """Neither of the two, or not in its one spelling. The message holds nothing of the address."""


@dataclass(frozen=True)
class DicomWeb:
    """A DICOMweb server: what its resources' URLs begin with, without a slash at the end."""

    url: str

    def __str__(self) -> str:
        return f"dicomweb+{self.url}"

    def within(self, root: "Remote") -> bool:
        return isinstance(root, DicomWeb) and f"{self.url}/".startswith(f"{root.url}/")


@dataclass(frozen=True)
class S3Prefix:
    """The objects below a folder of a bucket: the prefix is empty or ends with a slash."""

    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}"

    def within(self, root: "Remote") -> bool:
        return isinstance(root, S3Prefix) and self.bucket == root.bucket and self.prefix.startswith(root.prefix)


Remote = DicomWeb | S3Prefix


def is_remote(uri: str) -> bool:
    return uri.startswith(("s3:", "dicomweb+"))


def parse_remote(uri: str) -> Remote:
    """Where the URI leads, in its one spelling. Raises BadAddress."""
    if len(uri) > LONGEST or re.search(r"[\x00-\x1f\x7f]", uri):
        raise BadAddress(f"an address with control characters or of more than {LONGEST} characters")
    if uri.startswith("s3://"):
        return _bucket(uri)
    if uri.startswith(("dicomweb+http://", "dicomweb+https://")):
        return _server(uri.removeprefix("dicomweb+"))
    raise BadAddress(EXPECTED)


def _bucket(uri: str) -> S3Prefix:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not BUCKET.fullmatch(bucket):
        raise BadAddress("expected a bucket's name of 3 to 63 small letters, digits, dots and hyphens after s3://")
    return S3Prefix(bucket, f"{prefix.rstrip('/')}/" if prefix.strip("/") else "")


def _server(url: str) -> DicomWeb:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BadAddress(f"the server's address cannot be read, {EXPECTED}") from error
    if parts.username is not None or parts.password is not None:
        raise BadAddress(
            "a user in the address; credentials come by KEYSLICE_DICOMWEB_TOKEN or _USER and _PASSWORD alone"
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise BadAddress("a query in the address, expected it beside the address")
    # What a server or proxy may read as another path than the one that was allowed.
    if not parts.hostname or re.search(r"[\s%\\;]|//|/\.{1,2}(/|$)", f"{parts.netloc}{parts.path}"):
        raise BadAddress("an address without a host, or with %, //, dots or spaces in its path")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port in (None, {"http": 80, "https": 443}[parts.scheme]) else f"{host}:{port}"
    return DicomWeb(f"{parts.scheme}://{place}{parts.path.rstrip('/')}")
