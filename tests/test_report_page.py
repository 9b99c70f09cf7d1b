"""The HTML page of a head's report: it says what the report says, and needs nothing else."""

import re
from dataclasses import asdict
from datetime import UTC, datetime
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from models.heads.options import HeadOptions
from models.heads.train import LabelledBag, train_head
from service.report.chart import ABOVE, LEFT, SIDE, bars, square
from service.report.page import METRICS, page
from service.storage.tables import HeadRow
from workers.head_reports import completed

LABELS = ["nodule <script>alert(1)</script>", "effusion"]
ENCODER = "toy@0123456789ab"
MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
VOID = {"meta"}


@pytest.fixture(scope="module")
def report():
    """Of a real training on toy bags of 16 patients, four of them the test part."""
    random = np.random.default_rng(0)
    targets = [(float(k % 2), float(k // 2 % 2)) for k in range(16)]

    def load(k):
        return (random.normal(size=(4, 2, 6)) + 2 * np.array(targets[k] * 3)).astype(np.float16)

    bags = [LabelledBag(str(k), target, lambda k=k: load(k)) for k, target in enumerate(targets)]
    options = HeadOptions(folds=2, epochs=2, hidden=8, attention=4, baselines=("mean",), permutations=1)
    split = ["test"] * 4 + [""] * 12
    trained = train_head(bags, LABELS, options, lambda done, known: None, split=split)
    table = {
        "rows": [("p", [f"1.2.{k}"], []) for k in range(16)],
        "table": {"sha256": "f" * 64, "lines": 17},
        "warnings": [{"code": "unknown_rows", "detail": "1 row & more", "lines": [3]}],
    }
    row = HeadRow(head_id="h", encoder_id=ENCODER, options=asdict(options), targets=table)
    return completed(trained.report, row, ["abdomen", "lung"])


def shown(report):
    return page("0123456789ab", ENCODER, LABELS, MADE, report)


class Tags(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        self.text.append(data)


def parsed(html):
    tags = Tags()
    tags.feed(html)
    tags.close()
    assert tags.open == []
    return tags


def test_it_says_the_reports_own_numbers(report):
    text = "\n".join(parsed(shown(report)).text)

    for part in ("test", "validation"):
        for label in LABELS:
            for metric in METRICS:
                found = report[part][label][metric]
                if found is not None:
                    low, high = found["interval_95"]
                    assert f"{found['value']:.3f} [{low:.3f}, {high:.3f}]" in text
    for label, counts in report["cohort"]["labels"].items():
        row = "\n".join([label, *(str(counts[each]) for each in ("positive", "negative", "unknown"))])
        assert row in text
    for each in (report["command"], "f" * 64, ENCODER, report["note"], "unknown_rows: 1 row & more (lines 3)"):
        assert each in text
    for name, version in report["versions"].items():
        assert f"{name}\n{version}" in text
    baseline = report["baselines"]["mean"]["average"]["test"]["auroc"]["value"]
    assert f"mean\n{baseline:.3f}" in text


def test_it_asks_nothing_of_anybody_and_runs_no_script(report):
    html = shown(report)
    tags = parsed(html)

    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(tags.seen)
    assert not [name for name, _ in tags.attributes if name in ("src", "href", "xlink:href") or name.startswith("on")]
    assert not re.search(r"https?:|url\(|@import", html)


def test_curves_are_those_of_the_evaluated_part(report):
    html = shown(report)

    charts = [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", html)]
    named = [each.get("aria-label") for each in charts]
    assert named == [*["ROC", "Precision-recall", "Calibration", "Abstention"] * 2, "Share of attention by window"]
    for label, chart in zip(LABELS, charts[:-1:4], strict=True):
        roc = report["test"][label]["curves"]["roc"]
        (curve,) = chart.findall("polyline")
        drawn = np.array([each.split(",") for each in curve.get("points").split()], float)
        np.testing.assert_allclose((drawn[:, 0] - LEFT) / SIDE, roc["fpr"], atol=1e-3)
        np.testing.assert_allclose(1 - (drawn[:, 1] - ABOVE) / SIDE, roc["tpr"], atol=1e-3)


def test_a_label_of_one_class_has_no_curves_and_no_figures(report):
    lonely = {"bags": 4, "positives": 0, "curves": None} | dict.fromkeys(METRICS)
    text = "\n".join(parsed(shown(report | {"test": report["test"] | {"effusion": lonely}})).text)

    assert "One class only" in text
    assert "effusion\n4\n0\n" + "\n".join(["n/a"] * len(METRICS)) in text


def test_a_report_of_another_version_is_shown_as_it_is():
    text = "\n".join(parsed(shown({"report_version": 0, "old": "<b>"})).text)

    assert '"old": "<b>"' in text


def test_a_chart_keeps_its_points_inside_its_square():
    chart = ElementTree.fromstring(square("a & b", ("x", "y"), [(0, 0), (1, 0.2)], dots=True, highest=0.2))

    dots = [(float(each.get("cx")), float(each.get("cy"))) for each in chart.findall("circle")]
    assert dots == [(LEFT, ABOVE + SIDE), (LEFT + SIDE, ABOVE)]


def test_bars_are_as_long_as_their_means():
    chart = ElementTree.fromstring(bars("Shares", {"abdomen": (0.25, 0.1), "lung": (0.75, 0.5)}))

    short, long = (float(each.get("width")) for each in chart.findall("rect"))
    assert long == pytest.approx(3 * short, abs=0.2)
