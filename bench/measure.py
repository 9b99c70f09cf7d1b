"""The figures of one encoder: every patient measured by an encoder and heads that never saw them."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.embeddings import Embeddings
from bench.entries import Entry
from bench.intervals import Figure, auroc, mean, ratio
from bench.material import Material, Plan
from bench.pooling import Embedded, Head, chance_of_hit, hit, mass_over_uniform, pooled_scores, rank, trained
from bench.probe import probe_scores
from bench.regions import region_errors

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
    entry: Entry, material: Material, cache: Path, noted: Callable[[int], None], stepped: Callable[[], None]
) -> Measured:
    """Everything of one encoder. `noted` hears of slices embedded, `stepped` of each fold of each seed done."""
    answer = Measured()
    for number, held_out in enumerate(material.folds):
        embeddings = Embeddings(entry.encoder(held_out), cache, noted)
        for seed, plans in material.plans.items():
            _planted(answer, embeddings, plans, held_out, seed, f"{number}/{seed}", material)
            stepped()
        _contrast(answer, embeddings, material, held_out, str(number))
        _regions(answer, embeddings, material, held_out)
    return answer


def _planted(
    answer: Measured,
    embeddings: Embeddings,
    plans: list[Plan],
    held_out: frozenset[str],
    seed: int,
    run: str,
    material: Material,
) -> None:
    """Slices and bags with planted lesions, of one seed and one fold."""
    train, test = _bags(embeddings, plans, held_out)
    slices = {plan.series.name: _slices(embeddings, plan) for plan in plans}
    for task in TASKS:
        wanted = [bag for bag in train if _asked(bag, task)]
        asked = [bag for bag in test if _asked(bag, task)]
        _slice_probe(answer, slices, plans, held_out, seed, run, task)
        if not any(bag.positive for bag in asked):
            continue
        head = trained(wanted, seed)
        truth, patients = [bag.positive for bag in asked], [bag.patient for bag in asked]
        read = [head.read(bag.features) for bag in asked]
        answer.rows[f"abmil_auroc/{task}"].add(truth, [probability for probability, _ in read], patients, run)
        for how in ("mean", "max"):
            answer.rows[f"{how}_auroc/{task}"].add(
                truth, pooled_scores(how, wanted, asked, seed).tolist(), patients, run
            )
        for bag, (_, attention) in zip(asked, read, strict=True):
            if bag.positive:
                _attention(answer, bag, attention, task)
        if task == "conspicuous":
            _real_nodules(answer, embeddings, head, material, held_out)


def _asked(bag: Embedded, task: str) -> bool:
    return bag.conspicuous or task == "all"


def _bags(
    embeddings: Embeddings, plans: Sequence[Plan], held_out: frozenset[str]
) -> tuple[list[Embedded], list[Embedded]]:
    """Bags of the other patients, and of those held out."""
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


def _real_nodules(
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
