"""The model card of a trained head: what it is for, what it was made of, how good it is, and what it is not for."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from service.report.page import METRICS, REPORT_VERSION

LIMITS = """\
For research. Not a medical device, and not for clinical decisions. It has seen the patients counted under Data and no
others: whether a figure holds elsewhere is not known. No figure is broken down by age, sex, hospital or scanner, which
the service does not know. The labels are the table's, with their mistakes. Weights trained on patients' pictures are to
be kept as the terms of those pictures ask."""

NETWORKS = {
    "abmil": "attention pooling (ABMIL; CLEAR, Eq. 5 and 6)",
    "gated_abmil": "gated attention pooling (Ilse et al. 2018, Eq. 9)",
    "mean": "mean pooling",
    "max": "max pooling",
}
TASKS = {
    "multilabel": "each label has a probability of its own, and several may hold at once",
    "one_of_n": "exactly one label holds, and the probabilities sum to 1",
    "binary": "there is one label",
}
PROTOCOLS = {
    "kfold": """\
k-fold: each fold is the validation part of one network, which is trained on all other folds. There is no test part.""",
    "nested": """\
Nested folds: each outer fold is the test part of an ensemble over inner folds of all other patients. This head is none
of those ensembles but one more, trained the same way on everybody.""",
    "holdout": """\
Hold-out: the part `test`, where there is one, stayed out of training and of every choice. A single network is validated
on the part `validation`, several on folds of all that is not test.""",
}
TESTED = {
    "nested": "Figures of the way of training, not of this very ensemble: each patient by one that never saw them.",
    "holdout": "Figures of this ensemble, which neither trained on these patients nor chose anything by them.",
}
VALIDATED = """\
Each patient by a network that did not train on them. Early stopping saw these patients, so the figures are rather too
good than too bad. Temperature and threshold were chosen on {}."""
UNITS = {
    "folds": "folds", "inner_folds": "folds", "epochs": "epochs", "patience": "epochs", "batch_size": "bags",
    "hidden": "hidden units", "attention": "hidden units", "permutations": "trainings",
}  # fmt: skip
# Of a report whose keys may mean something else: those of the first reports, which held nothing of a single patient.
EARLIER = ("note", "patients", "bags", "folds", "validation", "options")
ROWS = re.compile(r": row [\d, .]+$")  # a warning's end names lines of the table, each of one patient, study or series


def model_card(
    head_id: str, encoder_id: str, labels: Sequence[str], created_at: datetime, report: Mapping[str, Any]
) -> str:
    """MODEL_CARD.md of a trained head (Mitchell et al. 2019, arXiv:1810.03993): CommonMark with tables.

    Counts and figures alone, nothing about one person. Of a report of another version than REPORT_VERSION it shows the
    keys of EARLIER as they are.
    """
    sections = {"Intended use": _use(encoder_id), "Limits": LIMITS}
    if report.get("report_version") == REPORT_VERSION:
        sections |= {
            "Warnings": _warnings(report),
            "What it predicts": _predicts(report, labels),
            "Data": _data(report, labels),
            "Training": _training(report),
            "Figures": _figures(report, labels),
            "Calibration": _calibration(report, labels),
            "Baselines": _baselines(report),
            "Labels shuffled among patients": _shuffled(report),
            "Attention": _attention(report),
            "How to load it": _loading(head_id, encoder_id, report["options"]),
            "Provenance": _provenance(report, encoder_id, created_at),
        }
    else:
        sections |= {"Labels": _listed(labels), "Report of another version": _earlier(report)}
    body = "\n\n".join(f"## {name}\n\n{text}" for name, text in sections.items())
    return f"# Head {_code(head_id)}\n\n{body}\n"


def _use(encoder_id: str) -> str:
    name, _, fingerprint = encoder_id.partition("@")
    return f"""\
Research with Keyslice on patients like those it was trained on: to predict its labels, to rank series by them, and to
look at the slices that a prediction rests on.

It reads bags of the encoder {_code(name)} with the fingerprint {_code(fingerprint)}, id {_code(encoder_id)}. On bags of
any other encoder it means nothing, and the service refuses them; the same weights at other windows are another encoder.
The encoder has a licence and limits of its own."""


def _warnings(report: Mapping[str, Any]) -> str:
    told = [f"- {_code(each['code'])}: {_code(ROWS.sub('', each['detail']))}" for each in report["warnings"]]
    return "\n".join(told) or "None."


def _predicts(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    by = report["by"] or "patient"
    read = "" if by == "series" else f", all embedded series of one {by} read together"
    return f"""\
A probability from 0 to 1 of each label per {by}{read}, in this order:

{_listed(labels)}

Task {_code(report["task"])}: {TASKS[report["task"]]}. Networks: {len(report["folds"])}, whose mean it is, of
{NETWORKS[report["options"]["network"]]}."""


def _data(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    cohort = report["cohort"]
    counts = ("positive", "negative", "unknown")
    rows = [(_code(label), *(str(cohort["labels"][label][count]) for count in counts)) for label in labels]
    parts = [(part, str(each["patients"]), str(each["bags"])) for part, each in cohort["parts"].items()]
    return f"""\
{cohort["patients"]} patients, {cohort["bags"]} bags, {cohort["series"]} series; a median of \
{cohort["slices"]["median"]:g} slices per bag.

{_table(("Patients by label", "Positive", "Negative", "Unknown"), rows)}

A patient with positive and negative bags counts as both. So does one who trains some networks and validates another:

{_table(("Part", "Patients", "Bags"), parts)}"""


def _training(report: Mapping[str, Any]) -> str:
    options = report["options"]
    rows = [(name, _code(json.dumps(value)), UNITS.get(name, "")) for name, value in options.items()]
    return f"""\
{PROTOCOLS[report["protocol"]]}

All bags of a patient are on one side of every split; folds are stratified by label as far as can be. Every network
starts from seeded weights of its own, trains for at most {options["epochs"]} epochs, stops after {options["patience"]}
without a lower loss on its validation part, and keeps the weights of its best epoch.

{_table(("Option", "Value", "Unit"), rows)}"""


def _figures(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    parts = "\n\n".join(_part(report, part, labels) for part in ("test", "validation") if report[part])
    return f"""\
Judge the head by its {report["evaluated"]} figures. Each is a number from 0 to 1 with its 95 % interval, by a bootstrap
over patients. Brier score and calibration error are better the lower, all others the higher. Sensitivity is that at a
specificity of at least {report["options"]["specificity"]:g}. n/a: these patients are of one class only.

{parts}"""


def _part(report: Mapping[str, Any], part: str, labels: Sequence[str]) -> str:
    chosen_on = "these very patients" if len(report["folds"]) == 1 else "the other folds than the patient's own"
    meaning = TESTED[report["protocol"]] if part == "test" else VALIDATED.format(chosen_on)
    rows = [
        (_code(label), str(each["bags"]), str(each["positives"]), *(_value(each[name]) for name in METRICS))
        for label, each in ((label, report[part][label]) for label in labels)
    ]
    if len(labels) > 1:
        rows.append(("average", "", "", *(_value(report["average"][part][name]) for name in METRICS)))
    return f"### {part.capitalize()}\n\n{meaning}\n\n{_table(('Label', 'Bags', 'Positive', *METRICS.values()), rows)}"


def _calibration(report: Mapping[str, Any], labels: Sequence[str]) -> str:
    rows = []
    for label in labels:
        chosen, figures = report["operating"][label], report[report["evaluated"]][label]
        before = _number((figures["uncalibrated"] or {}).get("ece"))
        exact = (f"{chosen[name]:g}" for name in ("temperature", "threshold"))  # somebody may call cases by them
        rows.append((_code(label), *exact, before, _value(figures["ece"])))
    header = ("Label", "Temperature", "Threshold (probability)", "Calibration error before", "Calibration error after")
    off = "" if report["options"]["temperature_scaling"] else " Temperature scaling was switched off."
    return f"""\
Logits are divided by the temperature before they become probabilities; a label is called positive from the threshold
on. Both are this head's, chosen on validation bags. Calibration errors are of the {report["evaluated"]} part.{off}

{_table(header, rows)}"""


def _baselines(report: Mapping[str, Any]) -> str:
    if not report["baselines"]:
        return "None was trained beside it."
    rows = [
        (_code(name), _code(label), *_compared((comparison or {}).get("auroc")))
        for name, found in report["baselines"].items()
        for label, comparison in found["comparison"].items()
    ]
    return f"""\
AUROC of this head and others with its splits, {report["evaluated"]} part; interval and p by a bootstrap over patients.

{_table(("Baseline", "Label", "This head", "Baseline's", "Head minus baseline", "p"), rows)}"""


def _compared(auroc: Mapping[str, Any] | None) -> tuple[str, ...]:
    if auroc is None:
        return ("n/a",) * 4
    difference = {"value": auroc["difference"], "interval_95": auroc["interval_95"]}
    return _number(auroc["a"]), _number(auroc["b"]), _value(difference), _number(auroc["p"])


def _shuffled(report: Mapping[str, Any]) -> str:
    if not report["permutation"]:
        return "This check was not made."
    rows = [
        (_code(label), ", ".join(map(_number, each["values"])), _number(each["expected_std"]))
        for label, each in report["permutation"]["auroc"].items()
    ]
    return f"""\
The same training on labels shuffled among patients: an honest one has an AUROC near 0.5.

{_table(("Label", "AUROC of each training", "Standard deviation of chance"), rows)}"""


def _attention(report: Mapping[str, Any]) -> str:
    by_window = report["attention"]["by_window"]
    rows = [(_code(window), _number(each["mean"]), _number(each["std"])) for window, each in by_window.items()]
    return f"""\
Which share of a bag's attention, from 0 to 1, each window has. It says where the head looked, not that it relied on it.

{_table(("Window", "Mean over bags", "Standard deviation over bags"), rows)}"""


def _loading(head_id: str, encoder_id: str, options: Mapping[str, Any]) -> str:
    # These four decide what network the weights fit, and what its logits become.
    chosen = ", ".join(f"{name}={json.dumps(options[name])}" for name in ("task", "network", "hidden", "attention"))
    download = f"""\
curl -OJ http://127.0.0.1:8000/v1/heads/{head_id}/weights
curl -H 'Accept: application/x-npy' -o bag.npy \\
     "http://127.0.0.1:8000/v1/series/$SERIES/embeddings?encoder={quote(encoder_id, safe="@")}\""""
    program = f"""\
from pathlib import Path
import numpy, torch
from models.heads.export import from_safetensors
from models.heads.options import HeadOptions

options = HeadOptions({chosen})
head = from_safetensors(Path("head-{head_id}.safetensors").read_bytes(), options)
bag = torch.from_numpy(numpy.load("bag.npy")).float().flatten(0, 1)  # (slices * windows, dim)
probabilities, attention = head(bag)  # (labels,) in the order above, (slices * windows,)"""
    return f"""\
Weights are safetensors, the bag of a series is an array of numpy; that of several series is theirs one after another.

{_fenced(download)}

{_fenced(program, "python")}"""


def _provenance(report: Mapping[str, Any], encoder_id: str, created_at: datetime) -> str:
    table = report["table"] or {}
    versions = {"code": report["code_version"], **report["versions"]}
    return f"""\
- Created: {created_at.isoformat(" ", "seconds")}
- Encoder: {_code(encoder_id)}
- Labels table: {table.get("lines")} lines, SHA-256 {_code(table.get("sha256"))}

{_fenced(report["command"])}

{_table(("Of", "Version"), [(name, _code(value)) for name, value in versions.items()])}"""


def _earlier(report: Mapping[str, Any]) -> str:
    kept = json.dumps({name: report[name] for name in EARLIER if name in report}, indent=1)
    return f"What of it is known to be of no single patient, as it stands:\n\n{_fenced(kept, 'json')}"


def _value(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "n/a"
    low, high = metric["interval_95"] or (None, None)
    return f"{_number(metric['value'])} [{_number(low)}, {_number(high)}]"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _listed(labels: Sequence[str]) -> str:
    return "\n".join(f"{number}. {_code(label)}" for number, label in enumerate(labels, 1))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    # A pipe ends a cell even inside a code span (GFM 4.10).
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: object) -> str:
    """Any text on one line, literally: in a code span nothing is markup, a link or HTML (CommonMark 6.1)."""
    shown = "".join(each if each.isprintable() else ascii(each)[1:-1] for each in str(text))
    ticks, apart = _longer_than_in(shown), " " if shown.strip(" `") != shown or not shown else ""
    return f"{ticks}{apart}{shown}{apart}{ticks}"


def _fenced(text: str, language: str = "") -> str:
    ticks = _longer_than_in(text, least=3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _longer_than_in(text: str, least: int = 1) -> str:
    """So many backticks that no run of them in the text ends what they open."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
