"""The figures of one encoder: every patient measured by an encoder and heads that never saw them."""

import gzip
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.embeddings import Embeddings
from bench.entries import Entry
from bench.intervals import Figure, auroc, mean, ratio
from bench.material import Material, Plan
from bench.pooling import OPTIONS, Embedded, Head, chance_of_hit, hit, mass_over_uniform, pooled_scores, rank, trained
from bench.probe import probe_scores
from bench.regions import region_errors
from bench.unseen import RECIPE

TASKS = ("conspicuous", "all")
FIRST = (1, 5)


@dataclass
class Rows:
    """Truth and score of cases, whose they are, and in which run they were scored."""

    truth: list[bool] = field(default_factory=list)
    score: list[float] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    run: list[str] = field(default_factory=list)

    def add(self, truth: Sequence[Any], score: Sequence[Any], patients: Sequence[Any], run: str) -> None:
        self.truth += [bool(each) for each in truth]
        self.score += [float(each) for each in score]
        self.patients += [str(each) for each in patients]
        self.run += [run] * len(truth)

    def auroc(self) -> Figure:
        return auroc(self.truth, self.score, self.patients, self.run)


class Measured:
    """Cases gathered over folds and seeds, and the figures they make."""

    def __init__(self) -> None:
        self.rows: dict[str, Rows] = defaultdict(Rows)
        self.values: dict[str, list[tuple[str, float]]] = defaultdict(list)  # by figure: patient, value
        self.ranks: dict[str, list[int]] = defaultdict(list)  # by patient with a real nodule: one a seed

    def add(self, other: "Measured") -> None:
        """The cases of another fold or seed."""
        for name, rows in other.rows.items():
            for mine, more in zip(vars(self.rows[name]).values(), vars(rows).values(), strict=True):
                mine.extend(more)
        for name, values in other.values.items():
            self.values[name] += values
        for patient, ranks in other.ranks.items():
            self.ranks[patient] += ranks

    def write(self, path: Path) -> None:
        """As JSON, scores to six digits, and zipped."""
        rows = {
            name: vars(each) | {"score": [float(f"{x:.6g}") for x in each.score]} for name, each in self.rows.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        said = json.dumps({"rows": rows, "values": self.values, "ranks": self.ranks})
        partial.write_bytes(gzip.compress(said.encode(), mtime=0))
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Measured":
        said, answer = json.loads(gzip.decompress(path.read_bytes())), cls()
        answer.rows.update({name: Rows(**each) for name, each in said["rows"].items()})
        answer.values.update({name: [(who, value) for who, value in each] for name, each in said["values"].items()})
        answer.ranks.update(said["ranks"])
        return answer

    def figures(self) -> dict[str, Figure]:
        """By name: AUROC and means over cases, with intervals by patient."""
        found = {name: rows.auroc() for name, rows in self.rows.items()}
        for name, values in self.values.items():
            found[name] = mean([value for _, value in values], [patient for patient, _ in values])
        for task in TASKS:
            if hits := self.values.get(f"hit_at_5/{task}"):
                chances, who = self.values[f"chance_hit_at_5/{task}"], [patient for patient, _ in hits]
                found[f"hit_at_5_over_chance/{task}"] = ratio([h for _, h in hits], [c for _, c in chances], who)
        return found


def measure(
    entry: Entry,
    material: Material,
    cache: Path,
    noted: Callable[[int], None],
    stepped: Callable[[], None],
    measured: Path | None = None,
) -> Measured:
    """Everything of one encoder. `noted` hears of slices embedded, `stepped` of each fold of each seed done.

    What `measured`, a folder of the cache unless it is given, holds of an earlier run is not measured again: then its
    encoder is not even trained.
    """
    answer, folder = Measured(), measured or cache / "measured"
    for number, held_out in enumerate(material.folds):
        opened = Opened(entry, held_out, cache, noted)
        for seed, plans in material.plans.items():
            said = [entry.name, entry.recipe, sorted(held_out), seed, [plan.name for plan in plans]]
            run = partial(_planted, opened.embeddings, plans, held_out, seed, f"{number}/{seed}", material)
            answer.add(kept_measures(folder / name_of(f"{entry.name}-{number}-seed{seed}", said), run))
            stepped()
        said = [entry.name, entry.recipe, sorted(held_out), sorted(material.axes)]
        run = partial(_real, opened.embeddings, material, held_out, str(number))
        answer.add(kept_measures(folder / name_of(f"{entry.name}-{number}-real", said), run))
    return answer


class Opened:
    """The embeddings by an encoder that never saw some patients; it is made, or trained, when they are asked for."""

    def __init__(self, entry: Entry, held_out: frozenset[str], cache: Path, noted: Callable[[int], None]) -> None:
        self._open = lambda: Embeddings(entry.encoder(held_out), cache, noted)
        self._opened: Embeddings | None = None

    def embeddings(self) -> Embeddings:
        self._opened = self._opened or self._open()
        return self._opened


def name_of(part: str, said: list[Any]) -> str:
    """The file of a part of the measures: everything that decides them."""
    decided = json.dumps([RECIPE, vars(OPTIONS), *said], sort_keys=True)
    return f"{part}-{hashlib.sha256(decided.encode()).hexdigest()[:12]}.json.gz"


def kept_measures(path: Path, run: Callable[[Measured], None]) -> Measured:
    """What `run` adds to nothing, or what it added when it ran before."""
    if path.is_file():
        return Measured.read(path)
    answer = Measured()
    run(answer)
    answer.write(path)
    return Measured.read(path)


def _planted(
    opened: Callable[[], Embeddings],
    plans: list[Plan],
    held_out: frozenset[str],
    seed: int,
    run: str,
    material: Material,
    answer: Measured,
) -> None:
    """Slices and bags with planted lesions, of one seed and one fold."""
    embeddings = opened()
    train, test = split(embeddings, plans, held_out)
    slices = {plan.series.name: _slices(embeddings, plan) for plan in plans}
    for task in TASKS:
        _slice_probe(answer, slices, plans, held_out, seed, run, task)
        head = measure_bags(answer, train, test, seed, run, task)
        if head and task == "conspicuous":
            real_nodules(answer, embeddings, head, material, held_out)


def _real(
    opened: Callable[[], Embeddings], material: Material, held_out: frozenset[str], run: str, answer: Measured
) -> None:
    """Nothing planted: contrast agent, and regions of the body."""
    _contrast(answer, opened(), material, held_out, run)
    _regions(answer, opened(), material, held_out)


def measure_bags(
    answer: Measured, train: Sequence[Embedded], test: Sequence[Embedded], seed: int, run: str, task: str
) -> Head | None:
    """What heads of one task, trained on `train`, make of `test`; the attention head, or None if nothing is asked."""
    wanted, asked = ([bag for bag in side if is_asked(bag, task)] for side in (train, test))
    if not any(bag.positive for bag in asked):
        return None
    head = trained(wanted, seed)
    truth, patients = [bag.positive for bag in asked], [bag.patient for bag in asked]
    read = [head.read(bag.features) for bag in asked]
    answer.rows[f"abmil_auroc/{task}"].add(truth, [probability for probability, _ in read], patients, run)
    for how in ("mean", "max"):
        answer.rows[f"{how}_auroc/{task}"].add(truth, pooled_scores(how, wanted, asked, seed).tolist(), patients, run)
    for bag, (_, attention) in zip(asked, read, strict=True):
        if bag.positive:
            _attention(answer, bag, attention, task)
    return head


def is_asked(bag: Embedded, task: str) -> bool:
    return bag.conspicuous or task == "all"


def split(
    embeddings: Embeddings, plans: Sequence[Plan], held_out: frozenset[str]
) -> tuple[list[Embedded], list[Embedded]]:
    """Bags of the other patients, and of those held out; either in the order of the plans."""
    train, test = [], []
    for plan in plans:
        side = test if plan.series.patient in held_out else train
        for bag, features in zip(plan.bags, embeddings.bags(plan.name, plan.bags, plan.series), strict=True):
            side.append(Embedded(bag.patient, features, bag.lesion, bag.conspicuous))
    return train, test


def _slices(embeddings: Embeddings, plan: Plan) -> list[tuple[np.ndarray[Any, Any], bool, bool]]:
    """Every slice with a lesion, and the same slice as it was: features, whether with lesion, whether conspicuous."""
    clean, answer = embeddings.clean(plan.series), []
    for bag, features in zip(plan.bags, embeddings.bags(plan.name, plan.bags, plan.series), strict=True):
        for place in bag.lesion:
            answer.append((features[place].ravel(), True, bag.conspicuous))
            answer.append((clean[bag.slices[place]].ravel(), False, bag.conspicuous))
    return answer


def _slice_probe(
    answer: Measured,
    slices: dict[str, list[Any]],
    plans: list[Plan],
    held_out: frozenset[str],
    seed: int,
    run: str,
    task: str,
) -> None:
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for plan in plans:
        for features, lesion, conspicuous in slices[plan.series.name]:
            if conspicuous or task == "all":
                sides[plan.series.patient in held_out].append((features, lesion, plan.series.patient))
    if not sides[True]:
        return
    (train, truth, patients), (test, asked, whose) = (
        tuple(map(np.array, zip(*sides[side], strict=True))) for side in (False, True)
    )
    answer.rows[f"probe_auroc/{task}"].add(asked, probe_scores(train, truth, patients, test, seed), whose, run)


def _attention(answer: Measured, bag: Embedded, attention: Any, task: str) -> None:
    for first in FIRST:
        found = {
            f"hit_at_{first}/{task}": float(hit(attention, bag.lesion, first)),
            f"chance_hit_at_{first}/{task}": chance_of_hit(len(attention), len(bag.lesion), first),
        }
        for name, value in found.items():
            answer.values[name].append((bag.patient, value))
    answer.values[f"lesion_mass_over_uniform/{task}"].append((bag.patient, mass_over_uniform(attention, bag.lesion)))


def real_nodules(
    answer: Measured, embeddings: Embeddings, head: Head, material: Material, held_out: frozenset[str]
) -> None:
    """Where the real nodule comes in the whole series, by attention."""
    for series in material.series:
        if series.nodule and series.patient in held_out:
            _, attention = head.read(embeddings.clean(series))
            answer.ranks[series.patient].append(rank(attention, series.nodule_slices))


def _contrast(answer: Measured, embeddings: Embeddings, material: Material, held_out: frozenset[str], run: str) -> None:
    """Contrast agent or not, on slices of patients without a volume."""
    features = embeddings.singles(material.singles).reshape(len(material.singles), -1)
    truth = np.array([single.contrast for single in material.singles])
    patients = np.array([single.patient for single in material.singles])
    test = np.isin(patients, list(held_out))
    scores = probe_scores(features[~test], truth[~test], patients[~test], features[test], 0)
    answer.rows["contrast_auroc"].add(truth[test], scores, patients[test], run)


def _regions(answer: Measured, embeddings: Embeddings, material: Material, held_out: frozenset[str]) -> None:
    """Queries from held-out patients into every other patient's series."""
    known = [series for series in material.series if series.name in material.axes]
    for query in known:
        for other in known:
            if query.patient in held_out and other.patient != query.patient:
                flat = [embeddings.clean(each).reshape(len(each.hu), -1) for each in (query, other)]
                errors, chances = region_errors(flat[0], material.axes[query.name], flat[1], material.axes[other.name])
                answer.values["region_error_mm"] += [(query.patient, float(error)) for error in errors]
                answer.values["chance_region_error_mm"] += [(query.patient, float(chance)) for chance in chances]
