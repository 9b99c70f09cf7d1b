"""`keyslice train` and `keyslice heads`: a running service's heads, trained, shown and promoted from here."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from service.client import Keyslice
from service.errors import JobFailed
from service.schemas.heads import Head, HeadAccepted

SHOWN = ("auroc", "auprc", "f1", "sensitivity", "brier", "ece")


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


def train(client: Keyslice, labels: Path, options: Mapping[str, Any], console: Console) -> Head:
    """The trained head; progress and warnings go to the console. Ctrl-C cancels the training. Raises KeysliceError."""
    sent: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, [])}
    accepted = client.train(labels, **sent)
    for warning in accepted.warnings:
        console.print(f"warning: {warning.detail}", style="yellow")
    try:
        _watch(client, accepted, console)
    except KeyboardInterrupt:
        job = client.cancel(accepted)
        raise JobFailed(f"head {accepted.head_id}: {job.error or job.state}") from None
    return client.get_head(accepted)


def show(head: Head, console: Console) -> None:
    """The figures of a head with their 95 % intervals, one line per label."""
    report = head.report or {}
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


def heads_table(heads: list[Head]) -> Table:
    """A line per head: name and version, state, labels, AUROC of the average over labels."""
    table = Table("head", "id", "state", "labels", "AUROC", "encoder", box=None)
    for head in sorted(heads, key=lambda each: (each.name, each.version)):
        report = head.report or {}
        figures = report.get("average", {}).get(report.get("evaluated"), {})
        table.add_row(
            f"{head.name}@{head.version}" + (" (promoted)" if head.promoted else ""),
            head.head_id,
            head.state,
            ", ".join(head.labels),
            _cell(figures.get("auroc")),
            head.encoder_id,
        )
    return table


def write(head: Head, path: Path) -> None:
    """The head with its whole report as JSON."""
    path.write_text(head.model_dump_json(indent=1) + "\n")


def _watch(client: Keyslice, training: HeadAccepted, console: Console) -> None:
    from service.watched import watched  # starts services; workers import this file too

    with watched(console) as show:
        client.wait(training, progress=show)


def _named(head: Head) -> str:
    """With name and version, where somebody named it."""
    own = head.head_id
    return own if head.name == own else f"{head.name}@{head.version} ({own})"


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    low, high = figure["interval_95"] or (float("nan"), float("nan"))
    return f"{figure['value']:.3f} ({low:.3f}-{high:.3f})"
