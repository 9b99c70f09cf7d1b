"""What every command needs of its terminal: the settings, the running service, a console, an end with a reason."""

import getpass
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from pydantic_core import to_json
from rich.console import Console

from service.errors import KeysliceError, StorageUnreachable, Unauthenticated
from service.settings import Settings

if TYPE_CHECKING:
    from service.client import Keyslice

T = TypeVar("T")

Service = Annotated[str | None, typer.Option(help="the service's address; that of the settings if none")]
AsJson = Annotated[bool, typer.Option("--json", help="print the answer as JSON")]


def read_settings() -> Settings:
    """The environment's settings; the process ends where they are wrong."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"KEYSLICE_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in error.errors()]
        fail("\n".join(lines))


def this_user() -> str:
    """Who runs the command, as the audit calls them."""
    try:
        return f"command:{getpass.getuser()}"
    except (KeyError, OSError):  # a container's user without a name
        return f"command:{os.getuid()}"


def console(*, to_stderr: bool = False) -> Console:
    """As wide as the terminal; in a pipe, wide enough for any table. Progress beside a file or JSON goes to stderr."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(width=None if stream.isatty() else 200, stderr=to_stderr)


def say_json(value: Any) -> None:
    """The one JSON document of a command's answer: of plain values, schemas and dataclasses; NaN is null."""
    typer.echo(to_json(value, indent=1, inf_nan_mode="null").decode())


def client_of(settings: Settings, address: str | None) -> "Keyslice":
    """For the service at the address, that of the settings if none; it sends the settings' API key."""
    from service.client import Keyslice

    key = settings.api_key.get_secret_value() if settings.api_key else ""
    return Keyslice(address or f"http://{settings.host}:{settings.port}", api_key=key)


def asked(service: str | None, question: "Callable[[Keyslice], T]") -> T:
    """What the running service answers to a question that takes a client; the process ends where it does not."""
    with client_of(read_settings(), service) as client:
        try:
            return question(client)
        except KeysliceError as error:
            fail(told(error), status=1)


def told(error: KeysliceError) -> str:
    """An error of the running service as a command says it."""
    status = f"{error.found['status']}: " if "status" in error.found else ""
    hint = "; KEYSLICE_API_KEY is the key that is sent" if isinstance(error, Unauthenticated) else ""
    return f"{status}{error}{hint}"


@contextmanager
def reaching_storage() -> Iterator[None]:
    """The process ends where the object store is away."""
    try:
        yield
    except StorageUnreachable as error:
        fail(str(error), status=1)


def fail(message: str, status: int = 2) -> NoReturn:
    """End the process with the reason on standard error; 2 says that the command was wrong."""
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(status)
