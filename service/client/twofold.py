"""One definition, two ways of waiting for it: `client.call(...)` blocks, `await client.call.aio(...)` does not.

What a call does is written once, as a coroutine over a Wire. The blocking wire never suspends, so its coroutines run
to their end in one step and need no event loop: they work in scripts, threads and notebooks alike.
"""

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from functools import update_wrapper
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from service.client.wire import Wire

P = ParamSpec("P")
T = TypeVar("T")


class Wired(Protocol):
    def blocking(self) -> Wire: ...

    def awaiting(self) -> Wire: ...


class BoundCall(Generic[P, T]):
    def __init__(self, run: Callable[Concatenate[Wire, P], Coroutine[Any, Any, T]], client: Wired) -> None:
        self._run, self._client = run, client
        _described(self, run)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return at_once(self._run(self._client.blocking(), *args, **kwargs))

    async def aio(self, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(self._client.awaiting(), *args, **kwargs)


class Call(Generic[P, T]):
    """A call that has one answer."""

    def __init__(self, run: Callable[Concatenate[Wire, P], Coroutine[Any, Any, T]]) -> None:
        self.run = run
        _described(self, run)

    @overload
    def __get__(self, client: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, client: Wired, owner: Any) -> BoundCall[P, T]: ...
    def __get__(self, client: Wired | None, owner: Any) -> Self | BoundCall[P, T]:
        return self if client is None else BoundCall(self.run, client)


class BoundEach(Generic[P, T]):
    def __init__(self, run: Callable[Concatenate[Wire, P], AsyncGenerator[T, None]], client: Wired) -> None:
        self._run, self._client = run, client
        _described(self, run)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return one_by_one(self._run(self._client.blocking(), *args, **kwargs))

    async def aio(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        async for item in self._run(self._client.awaiting(), *args, **kwargs):
            yield item


class Each(Generic[P, T]):
    """A call that answers item by item: `for` and `async for`."""

    def __init__(self, run: Callable[Concatenate[Wire, P], AsyncGenerator[T, None]]) -> None:
        self.run = run
        _described(self, run)

    @overload
    def __get__(self, client: None, owner: Any) -> Self: ...
    @overload
    def __get__(self, client: Wired, owner: Any) -> BoundEach[P, T]: ...
    def __get__(self, client: Wired | None, owner: Any) -> Self | BoundEach[P, T]:
        return self if client is None else BoundEach(self.run, client)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine that never suspends answers."""
    try:
        work.send(None)
    except StopIteration as end:
        answer: T = end.value
        return answer
    finally:
        work.close()
    raise RuntimeError("a blocking call has suspended")


def one_by_one(items: AsyncGenerator[T, None]) -> Iterator[T]:
    try:
        while True:
            try:
                item = at_once(items.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        at_once(items.aclose())


def _described(shown: Any, run: Callable[..., Any]) -> None:
    """Name, docstring and signature of a call, without its wire, for help() and notebooks."""
    update_wrapper(shown, run)
    signature = inspect.signature(run)
    shown.__signature__ = signature.replace(parameters=[*signature.parameters.values()][1:])
