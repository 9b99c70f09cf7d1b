"""Where documents may be sent: the peers that the setting names, and none that a caller makes up."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

AE_TITLE = r"^[!-\[\]-~]{1,16}$"  # ASCII without control characters, backslash and, for us, spaces (PS3.5 6.2)


class BadPeer(ValueError):
    """Neither a STOW-RS URL nor a C-STORE address."""


@dataclass(frozen=True)
class Stow:
    """A STOW-RS store (PS3.18 10.5): the whole URL that is posted to."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class CStore:
    """A C-STORE SCP (PS3.4 B): its address, and the title it is called by."""

    host: str
    port: int
    called_ae: str

    def __str__(self) -> str:
        return f"dicom://{self.called_ae}@{self.host}:{self.port}"


Peer = Stow | CStore


def parse_peers(text: str) -> frozenset[Peer]:
    """The peers of KEYSLICE_DICOM_PEERS, which stand between commas. Raises BadPeer."""
    return frozenset(parse_peer(each.strip()) for each in text.split(",") if each.strip())


def parse_peer(text: str) -> Peer:
    """`https://host[:port]/path` or `dicom://TITLE@host:port`, in its one spelling. Raises BadPeer."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise BadPeer(f"{error} in a peer's address") from error
    if not parts.hostname or parts.query or parts.fragment or any(each.isspace() for each in text):
        raise BadPeer("expected a peer as https://host/path or dicom://TITLE@host:port, without query or fragment")
    if parts.scheme == "dicom":
        return _c_store(parts.hostname, port, parts.username, parts.password, parts.path)
    if parts.scheme not in ("http", "https") or parts.username is not None:
        raise BadPeer("expected http, https or dicom, and a user's name in a dicom address alone")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port in (None, {"http": 80, "https": 443}[parts.scheme]) else f"{host}:{port}"
    return Stow(f"{parts.scheme}://{place}{parts.path or '/'}")


def _c_store(host: str, port: int | None, title: str | None, password: str | None, path: str) -> CStore:
    if not port or not re.match(AE_TITLE, title or "") or password is not None or path not in ("", "/"):
        raise BadPeer("expected dicom://TITLE@host:port, the title of 1 to 16 characters")
    return CStore(host, port, title or "")
