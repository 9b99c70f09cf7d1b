"""Whether a request was made on this machine, directly and not by a stranger's page in a browser here.

A service without keys asks this of every request: the address it listens on says nothing about a proxy before it.
"""

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

from service.settings import is_loopback

FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-real-ip")


def from_elsewhere(request: Request, cors_origins: str) -> str | None:
    """What speaks against it; None where nothing does. Callers within this process have no address."""
    if found := next((name for name in FORWARDED if name in request.headers), None):
        return f"this came through a proxy, by its header {found}"
    server, _ = request.scope.get("server") or ("", None)
    if server.startswith("/"):
        return "this came by a unix socket, as from a proxy"
    return _of_browser(request, server, cors_origins) if _is_address(server) else None


def _of_browser(request: Request, server: str, cors_origins: str) -> str | None:
    if not is_loopback(server):
        return f"this came to {server}"
    if not names_loopback(f"//{request.headers.get('host', 'localhost')}"):
        return "its Host is another machine's, as after DNS rebinding"
    origin = request.headers.get("origin", "//localhost")
    if not names_loopback(origin) and {origin, "*"}.isdisjoint(each.strip() for each in cors_origins.split(",")):
        return "it is from a page of another origin, which KEYSLICE_CORS_ORIGINS does not name"
    return None


def names_loopback(url: str) -> bool:
    try:
        return is_loopback(urlsplit(url).hostname or "")
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
