"""A head's report as one HTML page that needs nothing else: docs/heads.md says what the numbers are."""

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from html import escape
from typing import Any

from service.report.chart import bars, square

REPORT_VERSION = 1
METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "f1": "F1",
    "sensitivity": "Sensitivity",
    "brier": "Brier",
    "ece": "Calibration error",
}
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1b2430; max-width: 1000px; margin: 24px auto; padding: 0 16px; }
h1 { font-size: 24px; } h2 { font-size: 18px; margin-top: 32px; } h3 { font-size: 15px; }
table { border-collapse: collapse; margin: 8px 0; }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid #d9dfe6; text-align: left; }
td { font-variant-numeric: tabular-nums; } .note { color: #55606e; } .warn { color: #7a4b00; }
pre { background: #f3f5f8; padding: 10px; overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere; }
.charts { display: flex; flex-wrap: wrap; gap: 8px 16px; } svg { width: 270px; } svg.wide { width: 460px; }
svg text { font: 11px system-ui, sans-serif; fill: #55606e; } svg .title { font-weight: 600; fill: #1b2430; }
.grid { stroke: #e6eaef; } .chance { stroke: #7d8896; stroke-dasharray: 4 4; } .dot, .bar { fill: #0b5fa5; }
.curve { fill: none; stroke: #0b5fa5; stroke-width: 2; } .whisker { stroke: #1b2430; stroke-width: 2; }
@media print { body { margin: 0; } h2 { break-after: avoid; } svg, table { break-inside: avoid; } }
"""


def page(head_id: str, encoder_id: str, labels: list[str], created_at: datetime, report: Mapping[str, Any]) -> str:
    """The page of a trained head. A report of another version than REPORT_VERSION is shown as it is."""
    body = [
        f"<h1>Head {escape(head_id)}</h1>",
        "<p><strong>Research use only; not a medical device.</strong></p>",
        _table(
            ("", ""),
            [("Labels", ", ".join(labels)), ("Encoder", encoder_id), ("Created", created_at.isoformat(" ", "seconds"))],
        ),
    ]
    if report.get("report_version") == REPORT_VERSION:
        body += [
            *_summary(report),
            *_results(report, labels),
            *(part for label in labels for part in _charts(report, label)),
            *_beside(report),
            *_cohort(report),
            *_origin(report),
        ]
    else:
        body.append(f"<pre>{escape(json.dumps(report, indent=1))}</pre>")
    title = f"<title>Head {escape(head_id)}</title>"
    start = f'<!doctype html><html lang="en"><head><meta charset="utf-8">{title}<style>{STYLE}</style></head>'
    return f"{start}<body>{''.join(body)}</body></html>\n"


def _summary(report: Mapping[str, Any]) -> Iterable[str]:
    told = (
        f"{report['patients']} patients, {report['bags']} bags; protocol {report['protocol']}, task {report['task']}."
    )
    yield f"<p>{escape(told)} The figures are of its {escape(report['evaluated'])} part.</p>"
    yield f'<p class="note">{escape(report["note"])}</p>'
    for warning in report["warnings"]:
        lines = f" (lines {', '.join(map(str, warning['lines'][:20]))})" if warning["lines"] else ""
        yield f'<p class="warn">{escape(warning["code"])}: {escape(warning["detail"])}{escape(lines)}</p>'


def _results(report: Mapping[str, Any], labels: list[str]) -> Iterable[str]:
    """Every metric of every label, of the test part where there is one and of validation."""
    for part in ("test", "validation"):
        figures = report[part]
        if not figures:
            continue
        yield f"<h2>{part.capitalize()}</h2>"
        yield '<p class="note">value [95 % interval over patients]; mean &#177; standard deviation over the folds</p>'
        rows = [(label, *_counts(figures[label]), *_values(figures[label])) for label in labels]
        rows.append(("average", "", "", *_values(report["average"][part])))
        yield _table(("Label", "Bags", "Positive", *METRICS.values()), rows)


def _counts(figures: Mapping[str, Any]) -> tuple[str, str]:
    return str(figures["bags"]), str(figures["positives"])


def _values(figures: Mapping[str, Any]) -> list[str]:
    return [_value(figures.get(name)) for name in METRICS]


def _value(metric: Mapping[str, Any] | None) -> str:
    if metric is None or metric.get("value") is None:
        return "n/a"
    text, folds = _number(metric["value"]), metric.get("over_folds")
    if metric.get("interval_95"):
        low, high = metric["interval_95"]
        text += f" [{_number(low)}, {_number(high)}]"
    if folds and folds.get("mean") is not None:
        text += f"; {_number(folds['mean'])} \u00b1 {_number(folds['std'])}"
    return text


def _charts(report: Mapping[str, Any], label: str) -> Iterable[str]:
    """ROC, precision-recall, calibration and abstention of the part that was evaluated."""
    figures = (report[report["evaluated"]] or {}).get(label) or {}
    operating = (report["operating"] or {}).get(label) or {}
    yield f"<h2>{escape(label)}</h2>"
    if operating:
        told = ", ".join(f"{name} {_number(value)}" for name, value in operating.items())
        yield f'<p class="note">Chosen on validation: {escape(told)}.</p>'
    curves = figures.get("curves")
    if not curves:
        yield "<p>One class only: there are no curves.</p>"
        return
    roc, pr, calibration, risk = (curves.get(name) for name in ("roc", "pr", "calibration", "risk_coverage"))
    charts = []
    if roc:
        points = _points(roc["fpr"], roc["tpr"])
        charts.append(square("ROC", ("1 - specificity", "sensitivity"), points, diagonal=True))
    if pr:
        charts.append(square("Precision-recall", ("recall", "precision"), _points(pr["recall"], pr["precision"])))
    if calibration:
        points = _points(calibration["probability"], calibration["frequency"])
        charts.append(square("Calibration", ("mean probability", "frequency"), points, diagonal=True, dots=True))
    if risk:
        points = _points(risk["coverage"], risk["risk"])
        highest = max((y for _, y in points), default=0.0) or 1.0
        charts.append(square("Abstention", ("share answered", "share wrong"), points, highest=highest))
    yield f'<div class="charts">{"".join(charts)}</div>'


def _points(x: list[float | None], y: list[float | None]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]


def _beside(report: Mapping[str, Any]) -> Iterable[str]:
    """Attention by window, baselines, and the check on shuffled labels."""
    by_window = (report["attention"] or {}).get("by_window") or {}
    if by_window:
        shares = {window: (each["mean"], each["std"]) for window, each in by_window.items()}
        yield f"<h2>Attention</h2>{bars('Share of attention by window', shares)}"
    if report["baselines"]:
        yield '<h2>Baselines</h2><p class="note">AUROC, average over labels; the difference is head minus baseline</p>'
        yield _table(("Baseline", "AUROC", "Difference by label"), map(_baseline(report), report["baselines"].items()))
    if report["permutation"]:
        yield "<h2>Labels shuffled among patients</h2>"
        yield '<p class="note">An honest training has an AUROC near 0.5 on them.</p>'
        rows = [
            (label, ", ".join(map(_number, each["values"])), _number(each["expected_std"]))
            for label, each in report["permutation"]["auroc"].items()
        ]
        yield _table(("Label", "AUROC of each draw", "Expected standard deviation"), rows)


def _baseline(report: Mapping[str, Any]) -> Any:
    def row(item: tuple[str, Mapping[str, Any]]) -> tuple[str, str, str]:
        name, found = item
        average = (found["average"] or {}).get(report["evaluated"]) or {}
        differences = [
            f"{label}: {_value({'value': auroc['difference'], 'interval_95': auroc['interval_95']})}"
            for label, each in (found["comparison"] or {}).items()
            if (auroc := (each or {}).get("auroc"))
        ]
        return name, _value(average.get("auroc")), "; ".join(differences) or "n/a"

    return row


def _cohort(report: Mapping[str, Any]) -> Iterable[str]:
    cohort = report["cohort"]
    slices = cohort["slices"]
    told = f"{cohort['series']} series; {slices['least']} to {slices['most']} slices a bag, median {slices['median']}."
    yield f"<h2>Cohort</h2><p>{escape(told)}</p>"
    counts = ("positive", "negative", "unknown")
    rows = [(label, *(str(each[count]) for count in counts)) for label, each in cohort["labels"].items()]
    yield _table(("Patients", "Positive", "Negative", "Unknown"), rows)
    parts = [(part, str(each["patients"]), str(each["bags"])) for part, each in cohort["parts"].items()]
    yield _table(("Part", "Patients", "Bags"), parts)


def _origin(report: Mapping[str, Any]) -> Iterable[str]:
    """What repeats the training: command, table, options, versions."""
    yield f"<h2>Made by</h2><pre>{escape(str(report['command']))}</pre>"
    table = report["table"] or {}
    yield _table(
        ("", ""),
        [
            ("Labels table", f"{table.get('lines')} lines, SHA-256 {table.get('sha256')}"),
            *((name, str(value)) for name, value in report["versions"].items()),
        ],
    )
    yield _table(("Option", "Value"), [(name, json.dumps(value)) for name, value in report["options"].items()])


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(lines)}</tr></tbody></table>"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
