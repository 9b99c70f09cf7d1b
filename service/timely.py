"""Bodies that come slowly: a client that stands still, or takes too long, is answered with 408."""

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Timely:
    """ASGI middleware around every body, whoever reads it; what comes after the body may take any time."""

    def __init__(self, app: ASGIApp, seconds: float, silent_seconds: float) -> None:
        self._app = app
        self._seconds = seconds
        self._silent_seconds = silent_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        end, over = time.monotonic() + self._seconds, False

        async def in_time() -> Message:
            nonlocal over
            if over:
                return await receive()
            try:
                async with asyncio.timeout(min(self._silent_seconds, end - time.monotonic())):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408) from error
            over = not message.get("more_body", False)
            return message

        await self._app(scope, in_time if scope["type"] == "http" else receive, send)
