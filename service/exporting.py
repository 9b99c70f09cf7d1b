"""`keyslice embed`: an export by a running service, or by one for its duration; watched, and told as a table."""

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
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
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from service.calling import CallFailed, call, streamed
from service.embedded import in_background
from service.exports import file_uri, path_of
from service.remotes import is_remote
from service.settings import Settings

POLL_SECONDS = 0.5
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal
ENDED = ("done", "failed", "cancelled")
PAGE = 1000
SHOWN = 200  # series in the table on a terminal; --csv and --json have all


class ExportFailed(CallFailed):
    """The export came to no end of its own."""


@contextmanager
def a_service(settings: Settings, address: str | None, uri: str) -> Iterator[tuple[httpx.Client, bool]]:
    """A client of the service that runs, or else of one that is started and may read the URI; and which of them."""
    wanted = address or f"http://{settings.host}:{settings.port}"
    if address or _answers(wanted):
        with httpx.Client(base_url=wanted) as http:
            yield http, False
        return
    root = uri if is_remote(uri) else file_uri(path_of(uri))
    with (
        in_background(settings.data_dir, KEYSLICE_EXPORT_ROOTS=root) as running,
        httpx.Client(base_url=running.address) as http,
    ):
        yield http, True


def run(http: httpx.Client, asked: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """The export when it has ended, with every series, as GET /v1/exports/{export_id}. Raises CallFailed."""
    accepted = call(http, "POST", "/v1/exports", json=asked)
    found = "goes on where it was" if accepted["resumed"] else "begins"
    console.print(f"export {accepted['export_id']} {found}", highlight=False)
    job = watch(http, accepted["job_id"], console)
    if job["state"] != "done":
        raise ExportFailed(f"export {accepted['export_id']} {job['state']}: {job['error'] or 'on request'}")
    return whole(http, accepted["export_id"])


def whole(http: httpx.Client, export_id: str) -> dict[str, Any]:
    """All pages of an export."""
    path, query = f"/v1/exports/{export_id}", {"limit": str(PAGE)}
    export = call(http, "GET", path, params=query)
    while export["next_cursor"]:
        following = call(http, "GET", path, params=query | {"cursor": export["next_cursor"]})
        export = following | {"series": export["series"] + following["series"]}
    return export


def watch(http: httpx.Client, job_id: str, console: Console) -> dict[str, Any]:
    """The job when it has ended; its progress goes to the console, as bars on a terminal, else line by line."""
    show = _bars if console.is_terminal else _lines
    return deque(show(_polled(http, job_id), console), maxlen=1)[0]


def write_csv(http: httpx.Client, export_id: str, path: Path) -> None:
    """The table as the service writes it. Raises CallFailed or OSError."""
    timeout = httpx.Timeout(30, read=600)
    with path.open("wb") as file, streamed(http, f"/v1/exports/{export_id}/table.csv", {}, timeout) as response:
        for piece in response.iter_bytes():
            file.write(piece)


def table(export: Mapping[str, Any]) -> Table:
    """A row per series, those that were not embedded first where they are too many to show."""
    rows = export["series"]
    if len(rows) > SHOWN:
        rows = sorted(rows, key=lambda row: row["state"] == "embedded")[:SHOWN]
    shown = Table(Column("series", overflow="fold"), "state", "files", "slices", "set aside", "seconds", box=None)
    for row in rows:
        aside = ", ".join(f"{count} {reason}" for reason, count in row["set_aside"].items())
        cells = [row["state"], row["files"], row["slices"], row["error"] or aside, row["seconds"]]
        shown.add_row(row["series_uid"], *("" if cell is None else str(cell) for cell in cells))
    return shown


def summary(export: Mapping[str, Any]) -> list[str]:
    """What an export came to, in a few lines."""
    states = ", ".join(f"{count} {state}" for state, count in sorted(export["states"].items())) or "none"
    lines = [f"{export['files']} files, {export['slices']} slices embedded; series: {states}"]
    if export["set_aside"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(export["set_aside"].items()))
        lines.append(f"files not used: {reasons}; GET /v1/exports/{export['export_id']}/files names them")
    lines += [f"line {row['line']} of the queries: {row['detail']}" for row in export["bad_rows"]]
    if len(export["series"]) > SHOWN:
        lines.append(f"{SHOWN} of {len(export['series'])} series are shown; --csv and --json have all")
    return lines


def _answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/healthz", timeout=2).is_success
    except httpx.TransportError:
        return False


def _polled(http: httpx.Client, job_id: str) -> Iterator[dict[str, Any]]:
    while True:
        job = call(http, "GET", f"/v1/jobs/{job_id}")
        yield job
        if job["state"] in ENDED:
            return
        time.sleep(POLL_SECONDS)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.speed or task.finished_speed
        return Text(f"{speed:,.1f}/s" if speed else "")


def _bars(jobs: Iterator[dict[str, Any]], console: Console) -> Iterator[dict[str, Any]]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, _Rate(), TimeRemainingColumn(), console=console, speed_estimate_period=120) as progress:
        tasks = {}
        for job in jobs:
            unit = job["unit"]
            if unit not in tasks:
                tasks[unit] = progress.add_task(_doing(unit), total=None)
            progress.update(tasks[unit], completed=job["done"], total=job["known"] or None)
            yield job


def _lines(jobs: Iterator[dict[str, Any]], console: Console) -> Iterator[dict[str, Any]]:
    """A line every few seconds, and at each turn of what is done."""
    said, unit, began, before = float("-inf"), "", 0.0, 0
    for job in jobs:
        moment = time.monotonic()
        if job["unit"] != unit:
            said, unit, began, before = float("-inf"), job["unit"], moment, job["done"]
        if moment - said >= LINE_SECONDS or job["state"] in ENDED:
            said = moment
            console.print(_line(job, job["done"] - before, moment - began), highlight=False)
        yield job


def _line(job: Mapping[str, Any], done: int, seconds: float) -> str:
    known = f" of {job['known']}" if job["known"] else ""
    line = f"{_doing(job['unit'])}: {job['done']}{known} {job['unit']}"
    if done and seconds:
        line += f", {done / seconds:.1f}/s"
        if job["known"]:
            line += f", {(job['known'] - job['done']) * seconds / done:.0f} s left"
    return line


def _doing(unit: str) -> str:
    return "scan" if unit == "files" else "embed"
