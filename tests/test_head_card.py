"""The model card of a trained head: the report's own numbers, nobody's data, and lines that run."""

import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from starlette.testclient import TestClient

from models.ct.phantom import Identity
from models.zoo import DEFAULT_ENCODER, ENCODERS
from service.app import create_app
from service.report.card import model_card
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from workers import pipeline
from workers.resources import Resources

PATIENTS = 12
BRIGHT = [k % 2 for k in range(PATIENTS)]
LATE = ["", *[k // 3 % 2 for k in range(1, PATIENTS)]]
SPLIT = ["test" if k >= 6 else "" for k in range(PATIENTS)]
WINDOWS = ["abdomen", "lung"]
FAST = {"batch_size": "8", "learning_rate": "1e-3", "epochs": "2", "hidden": "16", "attention": "8", "folds": "2"}
EVIL = "x|`y`` \\| ```\n| --- |\n# <script>alert(1)</script> ![a](http://e.vil) **b** &amp; \u202e~~c~~ \\"
SHOWN = "x|`y`` \\| ```\\n| --- |\\n# <script>alert(1)</script> ![a](http://e.vil) **b** &amp; \\u202e~~c~~ \\"
MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
COMMONMARK = MarkdownIt("commonmark").enable(["table", "strikethrough"])


@dataclass
class Place:
    http: TestClient
    worker: Resources
    identities: list[Identity]

    def post(self, *columns: list, header: list[str], **options: object) -> str:
        """The id of a head that nobody trains."""
        text = io.StringIO()
        csv.writer(text).writerows([header, *zip(*columns, strict=True)])
        answer = self.http.post("/v1/heads", files={"labels": text.getvalue().encode()}, data=FAST | options)
        assert answer.status_code == 202, answer.text
        return answer.json()["head_id"]

    def trained(self, *columns: list, header: list[str], **options: object) -> str:
        head_id = self.post(*columns, header=header, **options)
        pipeline.train_head(head_id, self.worker)
        return head_id

    def card(self, head_id: str) -> str:
        answer = self.http.get(f"/v1/heads/{head_id}/card")
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "text/markdown; charset=utf-8"
        return answer.text

    @property
    def names(self) -> list[str]:
        return [each.patient_id for each in self.identities]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """API and worker in this process over the same stores, no broker between them; bags where an encoder puts them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    chosen = Settings(data_dir=tmp_path_factory.mktemp("card"), broker_url="redis://127.0.0.1:9/0", sweep_seconds=3600)
    worker = Resources(chosen)
    identities = [Identity(f"QXZCARD-{number}") for number in range(PATIENTS)]
    for k, identity in enumerate(identities):
        embedded(worker, identity, BRIGHT[k], k)
    with TestClient(create_app(chosen)) as http:
        yield Place(http, worker, identities)
    worker.close()
    torch.set_num_threads(threads)


def embedded(worker: Resources, identity: Identity, positive: int, seed: int) -> None:
    """A series of three slices with a bag; a positive one lies elsewhere."""
    key = EmbeddingKey(identity.series_uid, worker.own_encoder_id())
    catalog = worker.stores.catalog
    catalog.receive([Arrival(key.series_uid, identity.study_uid, identity.patient_id)], key.encoder_id)
    assert catalog.claim(key, "test", 60, 3)
    shape = (3, len(WINDOWS), ENCODERS[DEFAULT_ENCODER].dim)
    bag = np.random.default_rng(seed).normal(positive / 4, 1, shape).astype(np.float16)
    receipt = {"windows": WINDOWS, "sop_uids": [f"1.2.{seed}.{k}" for k in range(3)], "z_mm": [0.0, 5.0, 10.0]}
    content = worker.stores.archive.content(key.series_uid)[0]
    worker.stores.bags.put(key, content, bag, receipt)
    catalog.commit(key, content, len(bag), {"status": "accepted", "findings": [], "set_aside": []}, {})


@pytest.fixture(scope="module")
def head_id(place: Place) -> str:
    """Of a table with a test part, a label that is no good name, an unknown cell and a patient who is not here."""
    columns = (["QXZCARD-NOBODY", *place.names], [1, *BRIGHT], ["", *LATE], ["", *SPLIT])
    header = ["patient_id", EVIL, "late", "split"]
    return place.trained(*columns, header=header, baselines=["mean", "probe"], permutations="1", specificity="0.8")


@pytest.fixture(scope="module")
def card(place: Place, head_id: str) -> str:
    return place.card(head_id)


@pytest.fixture(scope="module")
def head(place: Place, head_id: str) -> dict:
    return place.http.get(f"/v1/heads/{head_id}").json()


@pytest.fixture(scope="module")
def report(head: dict) -> dict:
    return head["report"]


def tables(card: str) -> dict[str, list[list[list[str]]]]:
    """The tables under each heading: their rows' cells as text, each code span and text a piece of it."""
    found: dict[str, list[list[list[str]]]] = defaultdict(list)
    heading, tokens = "", COMMONMARK.parse(card)
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open":
            heading = text(following)
        elif token.type == "table_open":
            found[heading].append([])
        elif token.type == "tr_open":
            found[heading][-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[heading][-1][-1].append(text(following))
    return dict(found)


def text(inline: Token | None) -> str:
    return "".join(each.content for each in (inline and inline.children) or [])


def structure(card: str) -> list[tuple[str, str, list[str]]]:
    """What a reader's program makes of it, but for the text itself."""
    return [(each.type, each.tag, [child.type for child in each.children or []]) for each in COMMONMARK.parse(card)]


def code(card: str) -> list[str]:
    """Every code span."""
    return [
        child.content for each in COMMONMARK.parse(card) for child in each.children or [] if child.type == "code_inline"
    ]


def renamed(found: object, old: str, new: str) -> object:
    """A report in which a label has another name."""
    if isinstance(found, dict):
        return {new if key == old else key: renamed(value, old, new) for key, value in found.items()}
    return found


def value(metric: dict | None) -> str:
    if metric is None:
        return "n/a"
    low, high = metric["interval_95"]
    return f"{metric['value']:.3f} [{low:.3f}, {high:.3f}]"


def test_its_figures_are_the_reports_own(card, report):
    found = tables(card)

    metrics = ("auroc", "auprc", "f1", "sensitivity", "brier", "ece")
    labels = {EVIL: SHOWN, "late": "late"}
    for part in ("test", "validation"):
        rows = [
            [labels[label], str(each["bags"]), str(each["positives"]), *(value(each[name]) for name in metrics)]
            for label, each in report[part].items()
        ]
        average = ["average", "", "", *(value(report["average"][part][name]) for name in metrics)]
        assert found[part.capitalize()][0][1:] == [*rows, average]
    assert found["Calibration"][0][1:] == [
        [
            labels[label],
            f"{report['operating'][label]['temperature']:g}",
            f"{report['operating'][label]['threshold']:g}",
            f"{report['test'][label]['uncalibrated']['ece']:.3f}",
            value(report["test"][label]["ece"]),
        ]
        for label in labels
    ]
    for row in found["Baselines"][0][1:]:
        label = {shown: label for label, shown in labels.items()}[row[1]]
        auroc = report["baselines"][row[0]]["comparison"][label]["auroc"]
        low, high = auroc["interval_95"]
        numbers = [f"{auroc['a']:.3f}", f"{auroc['b']:.3f}", f"{auroc['difference']:.3f} [{low:.3f}, {high:.3f}]"]
        assert row[2:] == [*numbers, f"{auroc['p']:.3f}"]
    assert [row[0] for row in found["Baselines"][0][1:]] == ["mean", "mean", "probe", "probe"]
    assert found["Labels shuffled among patients"][0][1:] == [
        [labels[label], f"{each['values'][0]:.3f}", f"{each['expected_std']:.3f}"]
        for label, each in report["permutation"]["auroc"].items()
    ]
    assert found["Attention"][0][1:] == [
        [window, f"{each['mean']:.3f}", f"{each['std']:.3f}"]
        for window, each in report["attention"]["by_window"].items()
    ]


def test_its_data_are_counts_of_the_cohort(card, report):
    by_label, parts = tables(card)["Data"]

    assert "12 patients, 12 bags, 12 series; a median of 3 slices per bag." in card
    assert by_label[1:] == [[SHOWN, "6", "6", "0"], ["late", "6", "5", "1"]]
    assert parts[1:] == [["train", "6", "6"], ["validation", "6", "6"], ["test", "6", "6"]]
    assert report["cohort"]["labels"]["late"] == {"positive": 6, "negative": 5, "unknown": 1}


def test_it_says_what_made_it_and_what_it_needs(card, head, report):
    name, fingerprint = head["encoder_id"].split("@")

    assert f"the encoder `{name}` with the fingerprint `{fingerprint}`, id `{head['encoder_id']}`" in card
    assert f"- Labels table: {PATIENTS + 2} lines, SHA-256 `{report['table']['sha256']}`" in card
    assert f"```\n{report['command']}\n```" in card
    assert f"- Created: {datetime.fromisoformat(head['created_at']).isoformat(' ', 'seconds')}" in card
    assert dict(map(tuple, tables(card)["Provenance"][0][1:])) == report["versions"] | {"code": report["code_version"]}
    options = {row[0]: json.loads(row[1]) for row in tables(card)["Training"][0][1:]}
    assert options == report["options"]
    assert "Not a medical device, and not for clinical decisions." in card


def test_every_warning_is_there_without_the_lines_of_the_table(card, report):
    told = [each["detail"].removesuffix(": row 2") for each in report["warnings"]]

    assert report["warnings"][0]["lines"] == [2] and report["warnings"][0]["detail"].endswith(": row 2")
    assert "1 rows of the labels table name a patient that is not here" in told
    spans = code(card)
    for warning, detail in zip(report["warnings"], told, strict=True):
        assert spans[spans.index(warning["code"]) + 1] == detail


def test_nothing_in_it_is_about_one_person(place, card, head, report):
    row = place.worker.stores.heads.get(head["head_id"])

    names = [name for each in place.identities for name in (each.patient_id, each.study_uid, each.series_uid)]
    keys = [patient for patient, _, _ in row.targets["rows"]]
    assert [each for each in [*names, *keys, "QXZCARD"] if each in card] == []
    bare = {key: each for key, each in report.items() if key not in ("rows", "splits")}
    for part in ("test", "validation"):
        bare[part] = {label: each | {"curves": None} for label, each in bare[part].items()}
    bare["cohort"] = bare["cohort"] | {"slices": {"median": bare["cohort"]["slices"]["median"]}}
    bare["warnings"] = [each | {"lines": []} for each in bare["warnings"]]
    assert model_card(row.head_id, row.encoder_id, row.labels, row.created_at, bare) == card


def test_a_label_that_holds_markdown_and_html_stays_a_label(card, head):
    labels = ["plain", "late"]

    plain = model_card("0", "a@b", labels, MADE, renamed(head["report"], EVIL, "plain"))

    assert structure(card) == structure(plain)
    assert [each for each in code(card) if each == SHOWN] == [SHOWN] * code(plain).count("plain")
    assert "html_inline" not in str(structure(card)) and "html_block" not in str(structure(card))


def test_no_label_changes_the_structure(report):
    def made(label: str) -> list[tuple[str, str, list[str]]]:
        return structure(model_card("0", "a@b", [label, "late"], MADE, renamed(report, EVIL, label)))

    plain = made("plain")

    @settings(max_examples=50, deadline=None)
    @given(st.text(st.sampled_from("|`\\\n\r\t *_<>[]()#-+1.~&!:=\u2028\u202eab"), min_size=1, max_size=12))
    def check(label: str) -> None:
        assert made(label) == plain

    check()


@pytest.mark.parametrize(
    ("task", "network", "columns"),
    [
        ("multilabel", "abmil", (BRIGHT, LATE)),
        ("one_of_n", "gated_abmil", (BRIGHT, [1 - each for each in BRIGHT])),
        ("binary", "mean", (BRIGHT,)),
        ("multilabel", "max", (BRIGHT,)),
    ],
)
def test_its_lines_run_and_say_what_the_service_says(place, tmp_path, monkeypatch, task, network, columns):
    header = ["patient_id", "first", "second"][: 1 + len(columns)]
    head_id = place.trained(place.names, *columns, header=header, task=task, network=network, permutations="0")
    card, identity = place.card(head_id), place.identities[3]
    monkeypatch.chdir(tmp_path)
    weights, bag = re.findall(r"http://127\.0\.0\.1:8000(/[^\s\"]*)", card)

    answer = place.http.get(weights)
    saved = re.fullmatch(r'attachment; filename="([^"]+)"', answer.headers["content-disposition"])
    Path(saved[1]).write_bytes(answer.content)
    npy = place.http.get(bag.replace("$SERIES", identity.series_uid), headers={"Accept": "application/x-npy"})
    Path("bag.npy").write_bytes(npy.raise_for_status().content)
    names: dict[str, torch.Tensor] = {}
    exec(re.search(r"```python\n(.*?)\n```", card, re.DOTALL)[1], names)

    said = place.http.get(f"/v1/patients/{identity.patient_id}/predictions", params={"head": head_id}).json()
    assert names["probabilities"].tolist() == pytest.approx([*said["probabilities"].values()], abs=1e-6)
    assert [*said["probabilities"]] == header[1:]
    shares = names["attention"].reshape(-1, len(WINDOWS)).sum(dim=0).tolist()
    assert shares == pytest.approx([*said["window_share"].values()], abs=1e-6)
    assert "Early stopping saw these patients" in card and "### Test" not in card
    assert "None was trained beside it." in card and "This check was not made." in card


def test_it_says_what_each_part_means(card, head):
    nested = model_card("0", "a@b", head["labels"], MADE, head["report"] | {"protocol": "nested"})
    single = model_card("0", "a@b", head["labels"], MADE, head["report"] | {"folds": head["report"]["folds"][:1]})

    assert "Judge the head by its test figures." in card
    assert "Figures of this ensemble, which neither trained on these patients nor chose anything by them." in card
    assert card.index("### Test") < card.index("### Validation") < card.index("Early stopping saw these patients")
    assert "chosen on the other folds than the patient's own" in card
    assert "not of this very ensemble" in nested and "Figures of this ensemble" not in nested
    assert "chosen on these very patients" in single


def test_a_label_of_one_class_has_no_figures(head, report):
    nothing = dict.fromkeys(("auroc", "auprc", "f1", "sensitivity", "brier", "ece", "uncalibrated", "curves"))
    lonely = {"bags": 6, "positives": 0} | nothing
    baselines = {"mean": report["baselines"]["mean"] | {"comparison": {EVIL: None, "late": None}}}
    chance = {"draws": 1, "auroc": {EVIL: {"values": [None], "expected_std": None}}}
    changed = {"test": report["test"] | {"late": lonely}, "baselines": baselines, "permutation": chance, "table": None}

    found = tables(model_card("0", "a@b", head["labels"], MADE, report | changed))

    assert found["Test"][0][2] == ["late", "6", "0", *["n/a"] * 6]
    assert found["Calibration"][0][2][3:] == ["n/a", "n/a"]
    assert found["Baselines"][0][1] == ["mean", SHOWN, *["n/a"] * 4]
    assert found["Labels shuffled among patients"][0][1] == [SHOWN, "n/a", "n/a"]


def test_a_report_of_another_version_shows_what_is_of_nobody():
    earlier = {"patients": 7, "validation": {"```\n# a": {"auroc": {"value": 0.75}}}, "rows": {"patient": [1, 2]}}

    card = model_card("0123", "toy@ab", ["nodule", "```\n# a"], MADE, earlier)

    (shown,) = [each for each in COMMONMARK.parse(card) if each.type == "fence"]
    assert json.loads(shown.content) == {"patients": 7, "validation": earlier["validation"]}
    assert "Not a medical device" in card and "fingerprint `ab`" in card
    assert code(card)[-2:] == ["nodule", "```\\n# a"]
    assert [each.tag for each in COMMONMARK.parse(card) if each.type == "heading_open"] == ["h1", *["h2"] * 4]


def test_a_head_that_is_not_there_or_in_training_has_no_card(place):
    waiting = place.post(place.names, BRIGHT, header=["patient_id", "bright"])

    answers = [place.http.get(f"/v1/heads/{each}/card") for each in ("nobody", waiting)]

    assert [(each.status_code, each.json()["type"]) for each in answers] == [
        (404, "urn:keyslice:head-not-found"),
        (409, "urn:keyslice:head-not-ready"),
    ]
