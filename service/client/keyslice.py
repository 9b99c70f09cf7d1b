"""Keyslice: a running service, from Python."""

import asyncio
from typing import Any, Self
from weakref import WeakKeyDictionary

import httpx

from service.client import calls, head_calls
from service.client.twofold import Call, Each, at_once
from service.client.wire import Awaiting, Blocking, Wire, named, options


class Keyslice:
    """A running service. Each call waits for its answer; `await client.predict.aio(...)` is the same without waiting.

    Close it, or use it in a `with` or `async with` statement. It may be shared by threads; each event loop has
    connections of its own. `httpx_options` are those of httpx.Client: `timeout`, `verify`, `proxy`, `transport`.
    """

    request = Call(calls.request)

    upload = Call(calls.upload)
    complete = Call(calls.complete)
    series = Each(calls.series)
    get_series = Call(calls.get_series)
    tags = Call(calls.tags)
    set_tags = Call(calls.set_tags)
    erase_series = Call(calls.erase_series)
    erase_patient = Call(calls.erase_patient)

    get_job = Call(calls.get_job)
    wait = Call(calls.wait)
    events = Each(calls.events)
    cancel = Call(calls.cancel)

    embeddings = Call(calls.embeddings)
    embeddings_xarray = Call(calls.embeddings_xarray)
    features = Call(calls.features)
    encoders = Call(calls.encoders)

    train = Call(head_calls.train)
    heads = Each(head_calls.heads)
    get_head = Call(head_calls.get_head)
    promote = Call(head_calls.promote)
    compare = Call(head_calls.compare)
    predict = Call(head_calls.predict)
    get_prediction = Call(head_calls.get_prediction)
    attention = Call(head_calls.attention)
    plot_attention = Call(head_calls.plot_attention)
    similar = Call(head_calls.similar)
    similar_image = Call(head_calls.similar_image)
    similar_series = Call(head_calls.similar_series)

    export = Call(calls.export)
    exports = Each(calls.exports)
    get_export = Call(calls.get_export)
    export_table = Call(calls.export_table)

    def __init__(
        self, address: str = "http://127.0.0.1:8000", *, api_key: str | None = None, **httpx_options: Any
    ) -> None:
        self.address = named(address)
        self._options = {"base_url": address, **options(api_key, httpx_options)}
        self._blocking = Blocking(self.address, httpx.Client(**self._options))
        self._awaiting: WeakKeyDictionary[asyncio.AbstractEventLoop, Awaiting] = WeakKeyDictionary()

    def blocking(self) -> Wire:
        return self._blocking

    def awaiting(self) -> Wire:
        """That of the running event loop: a connection cannot move to another."""
        loop = asyncio.get_running_loop()
        if loop not in self._awaiting:
            self._awaiting[loop] = Awaiting(self.address, httpx.AsyncClient(**self._options))
        return self._awaiting[loop]

    def close(self) -> None:
        at_once(self._blocking.close())

    async def aclose(self) -> None:
        """Close what the running event loop has opened, and the rest."""
        self.close()
        if wire := self._awaiting.pop(asyncio.get_running_loop(), None):
            await wire.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"Keyslice({self.address!r})"
