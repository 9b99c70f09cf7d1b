"""Whether attention finds lesions: in whole series of real CT, on patients that neither encoder nor head has seen.

Lesions of a recipe that no training used are planted on at most a tenth of a series' slices; docs/benchmarks.md says
how each figure is defined. The service's default encoder, the one trained here and ImageNet's Lite0 are measured side
by side. Prints tables, and as its last line JSON. A second run reads what the cache holds, which may be that of
bench/fidelity.py.

    python bench/attention.py
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench.bags import Bag
from bench.embeddings import Embeddings
from bench.entries import DEFAULT, Entry, league
from bench.fidelity import CACHE, CONFIGS, DATA, PARTS, chosen, summary
from bench.intervals import NOTHING
from bench.material import Material, Plan, gather_whole
from bench.measure import (
    TASKS,
    Measured,
    Opened,
    is_asked,
    kept_measures,
    measure_bags,
    name_of,
    real_nodules,
    split,
)
from bench.patients import Series
from bench.pooling import Embedded, Floats, Head, scaled_as
from models.ct.windows import Window, apply_window

ASKED = ",".join(dict.fromkeys((DEFAULT, "imagenet_lite0")))
BAGS, QUICK_BAGS = 64, 16  # a patient and seed, half of them with a lesion
CLEARLY = 1.5  # times as much as at any other window: a solid nodule in lung is seen as well at either
COLUMNS = {  # figure, its heading, and what chance gives where that is the same for all bags
    "abmil_auroc": ("ABMIL", "0.5"),
    "mean_auroc": ("mean pooling", "0.5"),
    "max_auroc": ("max pooling", "0.5"),
    "hit_at_1": ("hit@1", ""),
    "hit_at_5": ("hit@5", ""),
    "lesion_mass_over_uniform": ("mass over uniform", "1"),
    "window_right": ("window right", "0.5"),
    "window_right_abdomen": ("of abdomen's", "0.5"),
    "window_right_lung": ("of lung's", "0.5"),
}

console = Console(width=170)


def main(
    data: Annotated[Path, typer.Option(help="Folder of real CT.")] = DATA,
    cache: Annotated[Path, typer.Option(help="Where bags, embeddings and trainings are kept.")] = CACHE,
    seeds: Annotated[int, typer.Option(help="Of planting, bags, probes and heads.")] = 3,
    folds: Annotated[int, typer.Option(help="Groups of patients that are held out together.")] = 3,
    encoders: Annotated[str, typer.Option(help="Names of bench/fidelity.py's league, with commas.")] = ASKED,
    quick: Annotated[bool, typer.Option(help="One seed and few bags: to see that it runs.")] = False,
    measured: Annotated[
        Path | None, typer.Option(help="What was measured before, not to be measured again; in the cache if none.")
    ] = None,
) -> None:
    """Measure the encoders and print their figures."""
    numbers, bags = range(1 if quick else seeds), QUICK_BAGS if quick else BAGS
    entries = chosen(league(cache, CONFIGS), encoders)
    with Progress(*PARTS, console=console) as progress:
        planting = progress.add_task("planting", total=None)
        material = gather_whole(data, cache, folds, numbers, bags, lambda: progress.advance(planting))
        progress.update(planting, total=1, completed=1)
        slices = progress.add_task("slices", total=len(entries) * slices_to_embed(material))
        heads = progress.add_task("folds and seeds", total=len(entries) * folds * len(numbers))
        noted, stepped = partial(progress.advance, slices), partial(progress.advance, heads)
        found = {each.name: measure_attention(each, material, cache, noted, stepped, measured) for each in entries}
    report(found, material)
    print(json.dumps(last_line(found)))


def slices_to_embed(material: Material) -> int:
    """By one entry over all folds."""
    planted = [len(bag.changed) for plans in material.plans.values() for plan in plans for bag in plan.bags]
    return len(material.folds) * (sum(len(series.hu) for series in material.series) + sum(planted))


def measure_attention(
    entry: Entry,
    material: Material,
    cache: Path,
    noted: Callable[[int], None],
    stepped: Callable[[], None],
    measured: Path | None = None,
) -> Measured:
    """Everything of one encoder, but for what `measured` (of the cache if none) holds, as in bench/measure.py.

    `noted` hears of slices embedded, `stepped` of each fold of each seed done.
    """
    answer, folder = Measured(), measured or cache / "measured"
    for number, held_out in enumerate(material.folds):
        opened = Opened(entry, held_out, cache, noted)
        for seed, plans in material.plans.items():
            said = [entry.name, entry.recipe, sorted(held_out), seed, [plan.name for plan in plans], CLEARLY]
            run = partial(_fold, opened.embeddings, plans, held_out, seed, f"{number}/{seed}", material)
            answer.add(kept_measures(folder / name_of(f"attention-{entry.name}-{number}-seed{seed}", said), run))
            stepped()
    return answer


def _fold(
    opened: Callable[[], Embeddings],
    plans: Sequence[Plan],
    held_out: frozenset[str],
    seed: int,
    run: str,
    material: Material,
    answer: Measured,
) -> None:
    """Bags, windows and real nodules of one seed and one fold."""
    embeddings = opened()
    windows = embeddings.encoder.windows
    train, test = split(embeddings, plans, held_out)
    tested = [plan for plan in plans if plan.series.patient in held_out]
    right = [right_window(bag, plan.series, windows) for plan in tested for bag in plan.bags]  # as `test`
    for task in TASKS:
        head = measure_bags(answer, train, test, seed, run, task)
        if head:
            _windows(answer, head, test, right, windows, task)
        if head and task == "conspicuous":
            real_nodules(answer, embeddings, head, material, held_out)


def right_window(bag: Bag, series: Series, windows: Sequence[Window]) -> Window | None:
    """The window at which the lesion changes its slices most, by mean absolute change in [0, 1].

    None in a clean bag, and where another window shows the lesion about as well.
    """
    if bag.planted is None:
        return None
    after = bag.planted[[bag.changed.index(place) for place in bag.lesion]].astype(np.float32)
    before = series.hu[[bag.slices[place] for place in bag.lesion]].astype(np.float32)
    changes = [float(np.abs(apply_window(after, each) - apply_window(before, each)).mean()) for each in windows]
    *_, second, most = np.argsort(changes)
    return windows[most] if changes[most] >= CLEARLY * changes[second] else None


def _windows(
    answer: Measured,
    head: Head,
    bags: Sequence[Embedded],
    right: Sequence[Window | None],
    windows: Sequence[Window],
    task: str,
) -> None:
    """Whether the attention on a lesion's slices is largest at its right window: over all, and by that window."""
    for bag, wanted in zip(bags, right, strict=True):
        if wanted and is_asked(bag, task):
            chosen = chosen_window(by_window(head, bag.features), bag.lesion, windows)
            for name in ("window_right", f"window_right_{wanted.name}"):
                answer.values[f"{name}/{task}"].append((bag.patient, float(chosen == wanted)))


def chosen_window(attention: NDArray[np.float64], lesion: Sequence[int], windows: Sequence[Window]) -> Window:
    """Where most of the attention (slices, windows) on the lesion's slices lies, wherever that on other slices does."""
    return windows[int(attention[list(lesion)].sum(axis=0).argmax())]


def by_window(head: Head, features: Floats) -> NDArray[np.float64]:
    """(slices, windows, dim) -> the head's attention (slices, windows), which `Head.read` sums over windows."""
    scaled = torch.from_numpy(scaled_as(features, head.mean, head.spread).astype(np.float32))
    with torch.inference_mode():
        _, attention = head.ensemble(scaled.flatten(0, 1))
    return np.asarray(attention.reshape(features.shape[:2]).double())


def last_line(measured: dict[str, Measured]) -> dict[str, Any]:
    """The figures of the default encoder, or of the first where it took no part; everybody's under `encoders`."""
    found = {name: summary(each) for name, each in measured.items()}
    first = DEFAULT if DEFAULT in found else next(iter(found))
    return {"encoder": first, **found[first], "encoders": found}


def report(measured: dict[str, Measured], material: Material) -> None:
    """Tables for people: what was planted, one for each task, and the real nodules."""
    console.print(_plants(material))
    figures = {name: each.figures() for name, each in measured.items()}
    for task in TASKS:
        headings = [heading for heading, _ in COLUMNS.values()]
        table = Table("encoder", *headings, title=_title(next(iter(measured.values())), task))
        for name, found in figures.items():
            table.add_row(name, *(str(found.get(f"{column}/{task}", NOTHING)) for column in COLUMNS))
        chances = {
            column: same or f"{found.get(f'chance_{column}/{task}', NOTHING).value:.3g}"
            for column, (_, same) in COLUMNS.items()
        }
        table.add_row("chance", *chances.values())
        console.print(table)
    console.print(_nodules(measured, material))


def _title(found: Measured, task: str) -> str:
    lesions, *windowed = (
        len(found.values[f"{name}/{task}"]) for name in ("hit_at_1", "window_right_abdomen", "window_right_lung")
    )
    return (
        f"{task}: {lesions} lesions, {windowed[0]} clearer at the abdomen and {windowed[1]} at the lung window, "
        "in patients never seen [95 % interval by patient]"
    )


def _plants(material: Material) -> Table:
    """What was planted into each series, over all seeds: medians, and what they lie between."""
    table = Table(
        "series", "slices", "mm", "lesions", "conspicuous", "diameter, mm", "contrast, HU", "of the slices, %"
    )
    for series in material.series:
        bags = [
            bag for plans in material.plans.values() for plan in plans if plan.series is series for bag in plan.bags
        ]
        lesions = [bag for bag in bags if bag.positive]
        table.add_row(
            series.name,
            str(len(series.hu) - len(series.suspect_slices)),
            f"{series.spacing_mm[0]:.3g}",
            str(len(lesions)),
            str(sum(bag.conspicuous for bag in lesions)),
            _spread([bag.diameter_mm for bag in lesions]),
            _spread([abs(bag.contrast_hu) for bag in lesions]),
            _spread([100 * len(bag.lesion) / len(bag.slices) for bag in lesions]),
        )
    return table


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})" if values else "-"


def _nodules(measured: dict[str, Measured], material: Material) -> Table:
    """The place of the real nodules' first slice by attention; chance is that of slices in any order."""
    annotated = [series for series in material.series if series.nodule]
    table = Table("encoder", *(f"{each.patient}: rank of {len(each.hu)}" for each in annotated), title="real nodules")
    for name, found in measured.items():
        table.add_row(name, *(", ".join(map(str, found.ranks.get(each.patient, []))) for each in annotated))
    table.add_row("chance", *(f"{(len(each.hu) + 1) / (len(each.nodule_slices) + 1):.3g}" for each in annotated))
    return table


if __name__ == "__main__":
    typer.run(main)
