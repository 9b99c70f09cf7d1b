"""`keyslice train` and `keyslice heads`: a running service's heads, trained, shown and promoted from here."""

import json
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from service.calling import CallFailed, call

POLL_SECONDS = 0.5
SHOWN = ("auroc", "auprc", "f1", "sensitivity", "brier", "ece")
ENDED = ("done", "failed", "cancelled")


class TrainingFailed(CallFailed):
    """The training ended without a head."""


def command_of(options: Mapping[str, Any], defaults: Mapping[str, Any], table: str = "labels.csv") -> str:
    """The `keyslice train` command that repeats a training: every option that is not the default."""
    words = ["keyslice", "train", table]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is None or value == defaults.get(name):
            continue
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            words += [word for each in value for word in (f"{flag.removesuffix('s')}", str(each))]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def train(http: httpx.Client, labels: Path, options: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """The trained head as GET /v1/heads/{head_id} answers; progress and warnings go to the console.

    Ctrl-C cancels the training. Raises CallFailed.
    """
    sent = {name: value for name, value in options.items() if value not in (None, [])}
    with labels.open("rb") as table:
        # Text, as a form has nothing else; a list becomes a field that is repeated.
        fields = {
            name: [_text(each) for each in value] if isinstance(value, list) else _text(value)
            for name, value in sent.items()
        }
        accepted = call(http, "POST", "/v1/heads", files={"labels": (labels.name, table)}, data=fields)
    for warning in accepted["warnings"]:
        console.print(f"warning: {warning['detail']}", style="yellow")
    try:
        job = _watch(http, accepted["job_id"], console)
    except KeyboardInterrupt:
        job = call(http, "POST", f"/v1/jobs/{accepted['job_id']}/cancel")
    if job["state"] != "done":
        raise TrainingFailed(f"head {accepted['head_id']}: {job['error'] or job['state']}")
    return call(http, "GET", f"/v1/heads/{accepted['head_id']}")


def show(head: Mapping[str, Any], console: Console) -> None:
    """The figures of a head with their 95 % intervals, one line per label."""
    report = head["report"]
    part = report["evaluated"]
    console.print(f"head {_named(head)}: {report['patients']} patients, {len(report['folds'])} folds; {part} figures")
    table = Table("label", "positive", *SHOWN, box=None)
    for label, figures in report[part].items():
        cells = [_cell(figures[name]) for name in SHOWN]
        table.add_row(label, f"{figures['positives']} of {figures['bags']}", *cells)
    if len(report[part]) > 1:
        table.add_row("average", "", *(_cell(report["average"][part][name]) for name in SHOWN))
    console.print(table)
    for name, baseline in report["baselines"].items():
        console.print(f"baseline {name}: AUROC {_cell(baseline['average'][part]['auroc'])}, average over the labels")
    for label, found in (report["permutation"] or {"auroc": {}})["auroc"].items():
        values = ", ".join("none" if each is None else f"{each:.3f}" for each in found["values"])
        console.print(f"labels shuffled: {label} AUROC {values} (chance: 0.5 with deviation {found['expected_std']})")
    for warning in report["warnings"]:
        console.print(f"warning: {warning['detail']}", style="yellow")


def list_heads(http: httpx.Client) -> list[dict[str, Any]]:
    """Every head, as GET /v1/heads answers. Raises CallFailed."""
    page = call(http, "GET", "/v1/heads")
    heads: list[dict[str, Any]] = page["heads"]
    while page["next_cursor"]:
        page = call(http, "GET", "/v1/heads", params={"cursor": page["next_cursor"]})
        heads += page["heads"]
    return heads


def promote(http: httpx.Client, reference: str) -> dict[str, Any]:
    """The head that its name alone means from now on. Raises CallFailed."""
    return call(http, "POST", f"/v1/heads/{quote(reference, safe='@')}/promote")


def heads_table(heads: list[dict[str, Any]]) -> Table:
    """A line per head: name and version, state, labels, AUROC of the average over labels."""
    table = Table("head", "id", "state", "labels", "AUROC", "encoder", box=None)
    for head in sorted(heads, key=lambda each: (each["name"], each["version"])):
        report = head["report"] or {}
        figures = report.get("average", {}).get(report.get("evaluated"), {})
        table.add_row(
            f"{head['name']}@{head['version']}" + (" (promoted)" if head["promoted"] else ""),
            head["head_id"],
            head["state"],
            ", ".join(head["labels"]),
            _cell(figures.get("auroc")),
            head["encoder_id"],
        )
    return table


def write(head: Mapping[str, Any], path: Path) -> None:
    """The head with its whole report as JSON."""
    path.write_text(json.dumps(head, indent=1) + "\n")


def _watch(http: httpx.Client, job_id: str, console: Console) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("epochs", total=None)
        while True:
            job = call(http, "GET", f"/v1/jobs/{job_id}")
            progress.update(task, completed=job["done"], total=job["known"] or None)
            if job["state"] in ENDED:
                return job
            time.sleep(POLL_SECONDS)


def _named(head: Mapping[str, Any]) -> str:
    """With name and version, where somebody named it."""
    own = head["head_id"]
    return own if head["name"] == own else f"{head['name']}@{head['version']} ({own})"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval_95"] or (float("nan"), float("nan"))
    return f"{figure['value']:.3f} ({low:.3f}-{high:.3f})"
