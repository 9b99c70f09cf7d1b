"""What every command needs of its terminal: the settings, the running service, a console, an end with a reason."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console

from service.settings import Settings

Service = Annotated[str | None, typer.Option(help="the service's address; that of the settings if none")]


def read_settings() -> Settings:
    """The environment's settings; the process ends where they are wrong."""
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"KEYSLICE_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in error.errors()]
        fail("\n".join(lines))


def console(*, to_stderr: bool = False) -> Console:
    """As wide as the terminal; in a pipe, wide enough for any table. Progress beside a file or JSON goes to stderr."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(width=None if stream.isatty() else 200, stderr=to_stderr)


def asked(service: str | None, question: Callable[[Any], Any]) -> Any:
    """What the running service answers to a question that takes an httpx client; the process ends where it does not."""
    from service.calling import CallFailed, client

    with client(read_settings(), service) as http:
        try:
            return question(http)
        except CallFailed as error:
            fail(str(error), status=1)


def fail(message: str, status: int = 2) -> NoReturn:
    """End the process with the reason on standard error; 2 says that the command was wrong."""
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(status)
