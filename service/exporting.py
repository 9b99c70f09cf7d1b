"""`keyslice embed`: an export by a running service, or by one for its duration; watched, and told as a table."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from service.client import Keyslice
from service.client.calls import ENDED
from service.embedded import in_background
from service.exports import file_uri, path_of
from service.remotes import is_remote
from service.schemas.exports import Export
from service.schemas.jobs import Job
from service.settings import Settings
from service.terminal import client_of

LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
SHOWN = 200  # series in the table on a terminal; --csv and --json have all


@contextmanager
def a_service(settings: Settings, address: str | None, uri: str) -> Iterator[tuple[Keyslice, bool]]:
    """A client of the service that runs, or else of one that is started and may read the URI; and which of them."""
    wanted = address or f"http://{settings.host}:{settings.port}"
    if address or _answers(wanted):
        with client_of(settings, wanted) as client:
            yield client, False
        return
    root = uri if is_remote(uri) else file_uri(path_of(uri))
    with (
        in_background(settings.data_dir, KEYSLICE_EXPORT_ROOTS=root) as running,
        client_of(settings, running.address) as client,
    ):
        yield client, True


def run(client: Keyslice, asked: Mapping[str, Any], console: Console) -> Export:
    """The export when it has ended, with every series; its progress goes to the console. Raises KeysliceError.

    Progress is bars on a terminal, else a line every few seconds.
    """
    accepted = client.export(**asked)
    found = "goes on where it was" if accepted.resumed else "begins"
    console.print(f"export {accepted.export_id} {found}", highlight=False)
    with (_bars if console.is_terminal else _lines)(console) as show:
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


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=2).is_success
    except httpx.TransportError:
        return False


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(f"{speed:,.1f}/s" if speed else "")


@contextmanager
def _bars(console: Console) -> Iterator[Callable[[Job], None]]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, _Rate(), TimeRemainingColumn(), console=console, speed_estimate_period=120) as progress:
        tasks: dict[str, TaskID] = {}

        def show(job: Job) -> None:
            if job.unit not in tasks:
                tasks[job.unit] = progress.add_task(_doing(job.unit), total=None)
            progress.update(tasks[job.unit], completed=job.done, total=job.known or None)

        yield show


@contextmanager
def _lines(console: Console) -> Iterator[Callable[[Job], None]]:
    """A line every few seconds, and at each turn of what is done."""
    said, unit, began, before = float("-inf"), "", 0.0, 0

    def show(job: Job) -> None:
        nonlocal said, unit, began, before
        moment = time.monotonic()
        if job.unit != unit:
            said, unit, began, before = float("-inf"), job.unit, moment, job.done
        if moment - said >= LINE_SECONDS or job.state in ENDED:
            said = moment
            console.print(_line(job, job.done - before, moment - began), highlight=False)

    yield show


def _line(job: Job, done: int, seconds: float) -> str:
    known = f" of {job.known}" if job.known else ""
    line = f"{_doing(job.unit)}: {job.done}{known} {job.unit}"
    if done and seconds:
        line += f", {done / seconds:.1f}/s"
        if job.known:
            line += f", {(job.known - job.done) * seconds / done:.0f} s left"
    return line


def _doing(unit: str) -> str:
    return "scan" if unit == "files" else "embed"
