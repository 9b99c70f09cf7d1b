"""`keyslice embed`: an export, watched, and told as a table."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from service.client import Keyslice
from service.exports import file_uri, path_of
from service.remotes import is_remote
from service.schemas.exports import Export
from service.watched import watched

SHOWN = 200  # series in the table on a terminal; --csv and --json have all


def root_of(uri: str) -> str:
    """What a service must be allowed to read for this export."""
    return uri if is_remote(uri) else file_uri(path_of(uri))


def run(client: Keyslice, asked: Mapping[str, Any], console: Console) -> Export:
    """The export when it has ended, with every series; its progress goes to the console. Raises KeysliceError."""
    accepted = client.export(**asked)
    found = "goes on where it was" if accepted.resumed else "begins"
    console.print(f"export {accepted.export_id} {found}", highlight=False)
    with watched(console) as show:
        client.wait(accepted, progress=show)
    return client.get_export(accepted.export_id)


def table(export: Export) -> Table:
    """A row per series, those that were not embedded first where they are too many to show."""
    rows = export.series
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: row.state == "embedded")[:SHOWN]
    shown = Table(Column("series", overflow="fold"), "state", "files", "slices", "set aside", "seconds", box=None)
    for row in rows:
        aside = ", ".join(f"{count} {reason}" for reason, count in row.set_aside.items())
        cells = [row.state, row.files, row.slices, row.error or aside, row.seconds]
        shown.add_row(row.series_uid, *("" if cell is None else str(cell) for cell in cells))
    return shown


def summary(export: Export) -> list[str]:
    """What an export came to, in a few lines."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(export.states.items())) or "none"
    lines = [f"{export.files} files, {export.slices} slices embedded; series: {states}"]
    if export.set_aside:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(export.set_aside.items()))
        lines.append(f"files not used: {reasons}; GET /v1/exports/{export.export_id}/files names them")
    lines += [f"line {row.line} of the queries: {row.detail}" for row in export.bad_rows]
    if len(export.series) > SHOWN:
        lines.append(f"{SHOWN} of {len(export.series)} series are shown; --csv and --json have all")
    return lines
