"""Bodies that are too long: refused by the length they tell, or as soon as they are longer than their route takes."""

from collections.abc import Callable, Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.dicomweb.addresses import PREFIX
from service.errors import UploadTooLarge
from service.routes.search import MAX_IMAGE_BYTES
from service.settings import Settings

# Routes that take files. A file in a form comes with as many bytes of fields as any other body may have.
FILES: Mapping[str, Callable[[Settings], int]] = {
    "POST /v1/series": lambda settings: settings.max_upload_bytes,
    f"POST {PREFIX}/studies": lambda settings: settings.max_upload_bytes,
    f"POST {PREFIX}/studies/{{study}}": lambda settings: settings.max_upload_bytes,
    "POST /v1/heads": lambda settings: settings.max_labels_bytes + settings.max_body_bytes,
    "POST /v1/search/image": lambda settings: MAX_IMAGE_BYTES + settings.max_body_bytes,
}


class Bounded:
    """ASGI middleware around every body, whoever reads it. One that nobody reads may be of any length."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            most = self._most(scope)
            if _told(scope) > most:
                raise UploadTooLarge(f"the body has {_told(scope)} bytes, expected at most {most}")
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise UploadTooLarge(f"the body is longer than {most} bytes")
            return message

        await self._app(scope, bounded if scope["type"] == "http" else receive, send)

    def _most(self, scope: Scope) -> int:
        """Bytes that the route, known by the time its body is read, takes."""
        path = getattr(scope.get("route"), "path_format", None)
        files = FILES.get(f"{scope['method']} {path}")
        return files(self._settings) if files else self._settings.max_body_bytes


def _told(scope: Scope) -> int:
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(length) if length.isdigit() else 0
