"""`keyslice keys`: who may call the service, and what for."""

import re
from datetime import datetime, timedelta
from typing import Annotated, get_args

import typer
from rich.table import Table

from service.errors import KeyNotFound
from service.settings import Settings
from service.storage.api_keys import ApiKeys, Scope
from service.storage.chain import Chain
from service.storage.database import Database, upgrade
from service.storage.tables import ApiKeyRow, now
from service.terminal import AsJson, console, fail, read_settings, say_json, this_user

keys = typer.Typer(no_args_is_help=True, help="API keys, in the catalog of the settings: make, list and revoke them.")

SCOPES: tuple[Scope, ...] = get_args(Scope)
UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
SHOWN = "%Y-%m-%d %H:%M"


@keys.command(epilog="Example: keyslice keys create --name reader --scope read --expires 90d")
def create(
    name: Annotated[str, typer.Option(help="whose it is or what it is for")],
    scope: Annotated[
        list[str], typer.Option(help=f"one of {', '.join(SCOPES)}; may be repeated, none includes another")
    ],
    tag: Annotated[
        list[str] | None, typer.Option(help="sees only series with this tag, or another one named; all if none")
    ] = None,
    expires: Annotated[str | None, typer.Option(help="after so long: 90d, 12h or 30m; never if none")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, alone on standard output. It is not shown again.

    From the first key on the service demands one of every caller, within a second.
    """
    if wrong := [each for each in scope if each not in SCOPES]:
        fail(f"no scope {wrong[0]!r}, expected of {', '.join(SCOPES)}")
    settings = read_settings()
    row, key = _store(settings).create(name, scope, _end(expires), this_user(), tag or ())
    ends = f"until {row.expires_at:{SHOWN}} UTC" if row.expires_at else "until it is revoked"
    seen = f"series tagged {' or '.join(row.tags)}" if row.tags else "every series"
    typer.echo(f"key {row.key_id}, {', '.join(row.scopes)}, {seen}, {ends}; it is shown only now:", err=True)
    if as_json:
        say_json({**_described(row), "key": key})
    else:
        typer.echo(key)


@keys.command(name="list", epilog="Example: keyslice keys list --json")
def list_keys(as_json: AsJson = False) -> None:
    """List every key ever made: name, scopes, state, when it was last used, to about an hour."""
    rows = _store(read_settings()).list()
    if as_json:
        say_json([_described(row) for row in rows])
        return
    table = Table("key", "name", "scopes", "series", "state", "made", "expires", "last used", box=None)
    for row in rows:
        times = (row.created_at, row.expires_at, row.used_at)
        table.add_row(
            row.key_id, row.name, ", ".join(row.scopes), ", ".join(row.tags) or "all", row.state, *map(_shown, times)
        )
    console().print(table)


@keys.command(epilog="Example: keyslice keys revoke 3f9a0c1d2e4b")
def revoke(
    key_id: Annotated[str, typer.Argument(help="the id, as `keyslice keys list` has it")], as_json: AsJson = False
) -> None:
    """End a key for good, within a second. Where it was the last one, nobody is served until there is another."""
    try:
        row = _store(read_settings()).revoke(key_id, this_user())
    except KeyNotFound as error:
        fail(str(error))
    if as_json:
        say_json(_described(row))
    else:
        typer.echo(f"key {row.key_id} ({row.name}) is revoked")


def _store(settings: Settings) -> ApiKeys:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.catalog_url, lock_dir=settings.data_dir)
    return ApiKeys(Database(settings.catalog_url), Chain(settings.audit_secret))


def _end(after: str | None) -> datetime | None:
    if after is None:
        return None
    parts = re.fullmatch(r"([1-9]\d{0,4})([dhm])", after)
    if parts is None:
        fail(f"--expires is {after!r}, expected a number and d, h or m, as 90d")
    return now() + int(parts[1]) * UNITS[parts[2]]


def _described(row: ApiKeyRow) -> dict[str, object]:
    times = ("created_at", "expires_at", "revoked_at", "used_at")
    told = {name: getattr(row, name) and getattr(row, name).isoformat() for name in times}
    return {"key_id": row.key_id, "name": row.name, "scopes": row.scopes, "tags": row.tags, "state": row.state, **told}


def _shown(when: datetime | None) -> str:
    return f"{when:{SHOWN}}" if when else "-"
