"""How well encoders see lesions, side by side, on patients that neither encoder nor head has seen.

Lesions of a recipe that no training used are planted into the real CT of the data folder; docs/fidelity.md says how
each figure is defined. Prints a table, and as its last line JSON. A second run reads what the cache holds.

    python bench/fidelity.py --encoders imagenet_lite0,hu_histogram
"""

import json
import math
import statistics
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bench.entries import SHIPPED, Entry, league
from bench.intervals import NOTHING, Figure
from bench.material import Material, gather
from bench.measure import TASKS, Measured, measure

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
CONFIGS = ROOT / "models" / "lecl" / "configs" / "fidelity"
BAGS, QUICK_BAGS = 64, 16  # a patient and seed
COLUMNS = {  # figure and its heading, for either task
    "probe_auroc": "slice probe",
    "abmil_auroc": "ABMIL",
    "mean_auroc": "mean pooling",
    "max_auroc": "max pooling",
    "hit_at_1": "hit@1",
    "hit_at_5": "hit@5",
    "lesion_mass_over_uniform": "mass over uniform",
}
OTHERS = {"contrast_auroc": "contrast", "region_error_mm": "region, mm"}

PARTS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
CACHE = Path("fidelity-cache")

console = Console(width=150)


def main(
    data: Annotated[Path, typer.Option(help="Folder of real CT.")] = DATA,
    cache: Annotated[Path, typer.Option(help="Where bags, embeddings and trainings are kept.")] = CACHE,
    encoders: Annotated[str, typer.Option(help="Names, with commas; all by default.")] = "",
    seeds: Annotated[int, typer.Option(help="Of planting, bags, probes and heads.")] = 3,
    folds: Annotated[int, typer.Option(help="Groups of patients that are held out together.")] = 3,
    quick: Annotated[bool, typer.Option(help="One seed and few bags: to see that it runs.")] = False,
    measured: Annotated[
        Path | None, typer.Option(help="What was measured before, not to be measured again; in the cache if none.")
    ] = None,
) -> None:
    """Measure the encoders and print their figures."""
    entries = chosen(league(cache, CONFIGS), encoders)
    numbers = range(1 if quick else seeds)
    with Progress(*PARTS, console=console) as progress:
        planting = progress.add_task("planting", total=None)
        bags = QUICK_BAGS if quick else BAGS
        material = gather(data, cache, folds, numbers, bags, lambda: progress.advance(planting))
        progress.update(planting, total=1, completed=1)
        every = progress.add_task("all encoders", total=len(entries) * folds * len(numbers))
        step = partial(progress.advance, every)
        found = {each.name: _one(each, material, cache, progress, step, measured) for each in entries}
    report(found)
    print(json.dumps(last_line(found)))


def last_line(measured: dict[str, Measured]) -> dict[str, Any]:
    """The figures of the shipped encoder, or of the first where it took no part, and everybody's."""
    first = SHIPPED if SHIPPED in measured else next(iter(measured))
    return {"encoder": first, **summary(measured[first]), "league": {n: summary(each) for n, each in measured.items()}}


def chosen(entries: list[Entry], names: str) -> list[Entry]:
    """Those asked for that can take part; why the others cannot is printed."""
    asked = [name for name in names.split(",") if name]
    if unknown := set(asked) - {entry.name for entry in entries}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not among {', '.join(e.name for e in entries)}")
    for entry in entries:
        if entry.absent and (not asked or entry.name in asked):
            console.print(f"{entry.name} is left out: {entry.absent}")
    return [entry for entry in entries if not entry.absent and (not asked or entry.name in asked)]


def _one(
    entry: Entry, material: Material, cache: Path, progress: Progress, stepped: Any, measured: Path | None
) -> Measured:
    """The entry's figures, said in one line as soon as they are there."""
    task = progress.add_task(f"{entry.name}: slices", total=slices_to_embed(material))
    try:
        found = measure(entry, material, cache, lambda done: progress.advance(task, done), stepped, measured)
    finally:
        progress.remove_task(task)
    figures = found.figures()
    said = ", ".join(f"{name} {figures[f'{name}/{TASKS[0]}']}" for name in ("probe_auroc", "abmil_auroc", "hit_at_5"))
    progress.console.print(f"{entry.name}: {said}")
    return found


def slices_to_embed(material: Material) -> int:
    """By one entry over all folds."""
    planted = [len(bag.changed) for plans in material.plans.values() for plan in plans for bag in plan.bags]
    clean = sum(len(series.hu) for series in material.series) + len(material.singles)
    return len(material.folds) * (clean + 2 * sum(planted))  # a bag's slices are read for heads and for the probe


def report(measured: dict[str, Measured]) -> None:
    """Tables for people: one for each task, one for the rest."""
    figures = {name: each.figures() for name, each in measured.items()}
    for task in TASKS:
        table = Table(
            "encoder", *COLUMNS.values(), title=f"{task} lesions, patients never seen [95 % interval by patient]"
        )
        for name, found in figures.items():
            table.add_row(name, *(_cell(found, column, f"/{task}") for column in COLUMNS))
        console.print(table)
    patients = sorted({patient for each in measured.values() for patient in each.ranks})
    table = Table("encoder", *OTHERS.values(), *(f"rank in {patient}" for patient in patients), title="real data alone")
    for name, found in figures.items():
        ranks = [", ".join(map(str, measured[name].ranks.get(patient, []))) for patient in patients]
        table.add_row(name, *(_cell(found, column, "") for column in OTHERS), *ranks)
    console.print(table)


def _cell(found: dict[str, Figure], name: str, task: str) -> str:
    """The figure, below it its interval, and chance where that is not the same for all."""
    chance = found.get(f"chance_{name}{task}", NOTHING)
    return f"{found.get(name + task, NOTHING)}" + ("" if math.isnan(chance.value) else f" chance {chance.value:.3g}")


def summary(measured: Measured) -> dict[str, Any]:
    """The figures for conspicuous lesions, their intervals, and those for all lesions under `all`."""
    found = measured.figures()
    shared = {name: figure for name, figure in found.items() if "/" not in name}
    conspicuous, every = (
        {name.partition("/")[0]: figure for name, figure in found.items() if name.endswith(f"/{task}")}
        for task in TASKS
    )
    ranks = {f"lidc_{patient[-4:]}_rank": statistics.median(each) for patient, each in sorted(measured.ranks.items())}
    return _values(conspicuous | shared) | ranks | {"all": _values(every)}


def _values(figures: dict[str, Figure]) -> dict[str, Any]:
    intervals = {name: [_number(each.low), _number(each.high)] for name, each in figures.items()}
    return {name: _number(each.value) for name, each in figures.items()} | {"interval_95": intervals}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


if __name__ == "__main__":
    typer.run(main)
