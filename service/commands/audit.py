"""`keyslice audit`: who read or wrote whose data, and whether the record of it is whole."""

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.table import Table

from service.settings import Settings
from service.storage.audit import Audit
from service.storage.chain import Chain
from service.storage.database import Database, upgrade
from service.storage.tables import now
from service.terminal import AsJson, console, fail, read_settings, say_json

audit = typer.Typer(no_args_is_help=True, help="The audit, in the catalog of the settings: verify and list it.")

UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}
SHOWN_KEYS = 3  # of an entry that names more, in the table


@audit.command(epilog="Example: keyslice audit verify --head 8123:9f86d081884c7d65...")
def verify(
    head: Annotated[
        str | None, typer.Option(help="SEQ:DIGEST that an earlier run printed: the chain must still hold it")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Walk the whole chain. Exit status 3 names the first entry that does not fit.

    Keep the head it prints elsewhere: entries that are cut off at the end leave no other trace.
    """
    if head is not None and not re.fullmatch(r"[1-9]\d{0,17}:[0-9a-f]{64}", head):
        fail("--head is not SEQ:DIGEST, expected what `keyslice audit verify` printed")
    found = _store(read_settings()).verify(head)
    if as_json:
        say_json(found)
    else:
        trimmed = f", {found.trimmed} before them were trimmed" if found.trimmed else ""
        typer.echo(f"{found.entries} entries fit{trimmed}; {found.signed} are signed by KEYSLICE_AUDIT_KEY")
        typer.echo(f"head {found.head or 'none'}")
    if found.wrong is not None:
        fail(f"entry {found.wrong} does not fit: {found.fault}", status=3)


@audit.command(name="list", epilog="Example: keyslice audit list --key 3f9a0c1d2e4b --since 7d")
def list_entries(
    series: Annotated[str | None, typer.Option(help="a SeriesInstanceUID that is here, or an opaque key")] = None,
    patient: Annotated[str | None, typer.Option(help="the id of a patient who is here, or an opaque key")] = None,
    key: Annotated[str | None, typer.Option(help="the id of an API key")] = None,
    since: Annotated[str | None, typer.Option(help="7d, 12h, 30m, or a time as 2026-01-31T08:00Z")] = None,
    limit: Annotated[int, typer.Option(min=0, help="so many of the newest; all if 0")] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="a line for each entry, as it is in the chain")] = False,
) -> None:
    """List the newest entries, the oldest of them first."""
    store = _store(read_settings())
    names = [store.series_key(series) or series] if series is not None else []
    names += [store.patient_key(patient) or patient] if patient is not None else []
    rows = store.list(names=names, who=f"key:{key}" if key is not None else None, since=_time(since), limit=limit)
    if as_json:
        for row in rows:
            typer.echo(row.entry)
        return
    table = Table("entry", "when (UTC)", "who", "what", "outcome", "times", "series", "patients", "about", box=None)
    for row in rows:
        table.add_row(*_cells(json.loads(row.entry)))
    console().print(table)


def _store(settings: Settings) -> Audit:
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.catalog_url, lock_dir=settings.data_dir)
    return Audit(Database(settings.catalog_url), Chain(settings.audit_secret))


def _time(since: str | None) -> datetime | None:
    if since is None:
        return None
    if parts := re.fullmatch(r"([1-9]\d{0,4})([dhm])", since):
        return now() - int(parts[1]) * UNITS[parts[2]]
    try:
        found = datetime.fromisoformat(since)
    except ValueError:
        fail(f"--since is {since!r}, expected a number and d, h or m, as 7d, or a time as 2026-01-31T08:00Z")
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _cells(entry: dict[str, Any]) -> list[str]:
    about = ", ".join(f"{name} {value}" for name, value in entry.get("about", {}).items())
    outcome = f"{entry['outcome']} {entry['status']}" if "status" in entry else entry["outcome"]
    return [
        str(entry["seq"]),
        entry["at"][:19].replace("T", " "),
        entry["who"],
        entry["kind"],
        outcome,
        str(entry.get("times", 1)),
        _shortened(entry.get("series", [])),
        _shortened(entry.get("patients", [])),
        about,
    ]


def _shortened(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN_KEYS} more" if len(keys) > SHOWN_KEYS else ""
    return " ".join(keys[:SHOWN_KEYS]) + more
