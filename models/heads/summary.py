"""The report of a trained head as JSON; docs/heads.md says what each key means."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from models.heads.comparison import Answers, compare
from models.heads.crossfit import Fitted, Outcome, Predictions
from models.heads.curves import curves
from models.heads.evaluation import evaluate
from models.heads.options import HeadOptions
from models.heads.protocols import TEST, TRAIN, Plan

REPORT_VERSION = 1
NOTES = {
    "validation": "validation: each patient by the fold that did not train on them, whose early stopping saw them",
    "test": "test: each patient by heads that neither trained on them nor chose anything by them",
}
CHANCE_DEVIATIONS = 3.0  # a mean AUROC on shuffled labels further from 0.5 than this is no chance
LIBRARIES = ("keyslice", "torch", "numpy", "scikit-learn", "scipy")

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cohort:
    truth: Floats  # (bags, labels) of 0, 1 and NaN for unknown
    patients: NDArray[Any]  # (bags,) running numbers
    labels: Sequence[str]
    shapes: Sequence[tuple[int, int, int]]  # (slices, windows, dim) of each bag

    def patients_where(self, rows: NDArray[Any]) -> int:
        return len(np.unique(self.patients[rows]))


def summary(
    cohort: Cohort,
    plan: Plan,
    options: HeadOptions,
    outcome: Outcome,
    baselines: Mapping[str, Outcome],
    shuffled: Sequence[tuple[Floats, Outcome]],
) -> dict[str, Any]:
    """What is known of a head from its bags; the table, the encoder and the code's version are the caller's to add."""
    permutation = _permutation(cohort, shuffled)
    return {
        "report_version": REPORT_VERSION,
        "task": options.task,
        "options": asdict(options),
        "patients": len(np.unique(cohort.patients)),
        "bags": len(cohort.truth),
        "cohort": _cohort(cohort, plan),
        "warnings": _warnings(cohort, plan, options, outcome, permutation),
        "protocol": plan.protocol,
        "evaluated": "test" if outcome.test else "validation",
        "folds": [member.report for member in outcome.deployed.members],
        "outer_folds": [_outer(fitted) for fitted in outcome.outer],
        **_measured(cohort, options, outcome, with_curves=True),
        "operating": {
            label: {"threshold": round(float(threshold), 6), "temperature": round(float(temperature), 6)}
            for label, threshold, temperature in zip(
                cohort.labels, outcome.deployed.threshold, outcome.deployed.temperature, strict=True
            )
        },
        "attention": _attention(outcome.evaluated.window_share),
        "baselines": {
            name: _measured(cohort, options, other, with_curves=False)
            | {"comparison": _compared(cohort, options, outcome.evaluated, other.evaluated)}
            for name, other in baselines.items()
        },
        "permutation": permutation,
        "splits": plan.named(),
        "rows": _rows(cohort, plan, outcome),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "note": NOTES["test" if outcome.test else "validation"],
    }


def _measured(cohort: Cohort, options: HeadOptions, outcome: Outcome, with_curves: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"average": {}}
    for part, said in (("validation", outcome.deployed.validation), ("test", outcome.test)):
        if said is None:
            answer[part] = answer["average"][part] = None
            continue
        found = evaluate(said, cohort.truth, cohort.patients, cohort.labels, options.specificity, options.seed)
        if with_curves:
            for k, label in enumerate(cohort.labels):
                found.labels[label]["curves"] = curves(cohort.truth[said.rows, k], said.probability[:, k])
        answer[part], answer["average"][part] = found.labels, found.average
    return answer


def _compared(cohort: Cohort, options: HeadOptions, a: Predictions, b: Predictions) -> dict[str, Any]:
    truth, patients = cohort.truth[a.rows], cohort.patients[a.rows]
    return {
        label: compare(
            truth[:, k],
            Answers(a.probability[:, k], a.called[:, k]),
            Answers(b.probability[:, k], b.called[:, k]),
            patients,
            options.specificity,
            options.seed,
        )
        for k, label in enumerate(cohort.labels)
    }


def _cohort(cohort: Cohort, plan: Plan) -> dict[str, Any]:
    slices = np.array([shape[0] for shape in cohort.shapes])
    parts = plan.deployed.of_row
    tested = np.any([each.of_row == TEST for each in (plan.deployed, *plan.outer)], axis=0)
    # Of two folds or more every patient of a fold trains the others.
    trained = (parts != TEST) if plan.deployed.folds > 1 else (parts == TRAIN)
    chosen = {"train": trained, "validation": parts >= 0, "test": tested}
    return {
        "slices": {"least": int(slices.min()), "median": float(np.median(slices)), "most": int(slices.max())},
        "labels": {
            label: {
                "positive": cohort.patients_where(column == 1),
                "negative": cohort.patients_where(column == 0),
                "unknown": cohort.patients_where(np.isnan(column)),
            }
            for label, column in zip(cohort.labels, cohort.truth.T, strict=True)
        },
        "parts": {
            name: {"patients": cohort.patients_where(rows), "bags": int(rows.sum())} for name, rows in chosen.items()
        },
    }


def _warnings(
    cohort: Cohort, plan: Plan, options: HeadOptions, outcome: Outcome, permutation: dict[str, Any] | None
) -> list[dict[str, Any]]:
    found = []
    asked = [(options.inner_folds if plan.protocol == "nested" else options.folds, plan.deployed.folds)]
    asked += [(options.folds, len(plan.outer))] if plan.outer else []
    asked += [(options.inner_folds, parts.folds) for parts in plan.outer]
    fewer = [f"{made} of {wanted}" for wanted, made in asked if made < wanted]
    if fewer and (plan.deployed.of_row != TRAIN).all():  # a validation part of the table asks for no folds
        found.append(("fewer_folds", f"too few patients of a class for the folds asked for: {', '.join(fewer)}"))
    for k, label in enumerate(cohort.labels):
        column = cohort.truth[outcome.evaluated.rows, k]
        if len(np.unique(column[~np.isnan(column)])) < 2:
            found.append(("one_class", f"label {label[:50]!r} has one class among the patients it is measured on"))
    for label, chance in (permutation or {"auroc": {}})["auroc"].items():
        values = [value for value in chance["values"] if value is not None]
        if values and abs(np.mean(values) - 0.5) > CHANCE_DEVIATIONS * chance["expected_std"] / np.sqrt(len(values)):
            found.append(("permutation", f"label {label[:50]!r} is told apart even where it was shuffled"))
    return [{"code": code, "detail": detail, "lines": []} for code, detail in found]


def _permutation(cohort: Cohort, shuffled: Sequence[tuple[Floats, Outcome]]) -> dict[str, Any] | None:
    """AUROCs on shuffled labels, and how far from 0.5 chance leads one of them: one standard deviation.

    That of Mann and Whitney (1947), over patients: labels are shuffled among them, so a patient's bags count as one.
    """
    if not shuffled:
        return None
    found = {}
    for k, label in enumerate(cohort.labels):
        values: list[float | None] = []
        deviation = None
        for truth, outcome in shuffled:
            rows = outcome.evaluated.rows
            column, said = truth[rows, k], outcome.evaluated.probability[:, k]
            known = ~np.isnan(column)
            positives, negatives = (cohort.patients_where(rows[column == value]) for value in (1, 0))
            if not positives or not negatives:
                values.append(None)
                continue
            values.append(round(float(roc_auc_score(column[known], said[known])), 4))
            deviation = round(float(np.sqrt((positives + negatives + 1) / (12 * positives * negatives))), 4)
        found[label] = {"values": values, "expected_std": deviation}
    return {"draws": len(shuffled), "auroc": found}


def _outer(fitted: Fitted) -> dict[str, Any]:
    return {"test_bags": len(fitted.parts.test), "folds": [member.report for member in fitted.members]}


def _attention(shares: Floats) -> dict[str, Any]:
    """Windows are numbered; the caller knows their names."""
    rounded = [{"mean": round(float(column.mean()), 4), "std": round(float(column.std()), 4)} for column in shares.T]
    return {"by_window": {str(number): each for number, each in enumerate(rounded)}}


def _rows(cohort: Cohort, plan: Plan, outcome: Outcome) -> dict[str, Any]:
    """One entry per bag: what was said of it, and by which part of the plan."""
    return {
        "patient": [int(each) for each in cohort.patients],
        "part": plan.deployed.named(),
        "validation": _said(cohort, outcome.deployed.validation),
        "test": _said(cohort, outcome.test) if outcome.test else None,
    }


def _said(cohort: Cohort, said: Predictions) -> dict[str, Any]:
    answer = {}
    for k, label in enumerate(cohort.labels):
        probability: list[float | None] = [None] * len(cohort.truth)
        called: list[int | None] = [None] * len(cohort.truth)
        for place, row in enumerate(said.rows):
            probability[row] = round(float(said.probability[place, k]), 7)
            called[row] = int(said.called[place, k])
        answer[label] = {"probability": probability, "called": called}
    return answer
