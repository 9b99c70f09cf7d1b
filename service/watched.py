"""What commands that take long need: a service, running already or for their duration, and its progress."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

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
from rich.text import Text

from service.client import Keyslice
from service.client.calls import ENDED
from service.embedded import in_background
from service.schemas.jobs import Job
from service.settings import Settings
from service.terminal import client_of

DOING = {"files": "scan", "epochs": "train"}  # by a job's unit; anything else is embedded
LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


@contextmanager
def a_service(
    settings: Settings, address: str | None, export_roots: str | None = None
) -> Iterator[tuple[Keyslice, bool]]:
    """A client of the service that runs, or else of one that is started, with these roots; and whether it was."""
    wanted = address or f"http://{settings.host}:{settings.port}"
    if address or _answers(wanted):
        with client_of(settings, wanted) as client:
            yield client, False
        return
    roots = settings.export_roots if export_roots is None else export_roots
    with (
        in_background(settings.data_dir, KEYSLICE_EXPORT_ROOTS=roots) as running,
        client_of(settings, running.address) as client,
    ):
        yield client, True


def watched(console: Console) -> AbstractContextManager[Callable[[Job], None]]:
    """Shows a job each time it is called with it: bars on a terminal, else a line every few seconds."""
    return _bars(console) if console.is_terminal else _lines(console)


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
    return DOING.get(unit, "embed")
