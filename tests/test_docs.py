"""Every setting, route, reason and file the docs speak of is there, and the other way round."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from pydicom import uid
from pydicom.uid import UID
from pynetdicom.sop_class import Verification
from starlette.testclient import TestClient

from models.ct.decode import DECODERS
from models.ct.reasons import Reason
from models.heads.options import HeadOptions
from models.modes import WAYS
from models.zoo import ENCODERS
from service.app import MOST_ERRORS, STATUSES, create_app
from service.errors import kinds
from service.settings import Settings
from workers.receiver import STORAGE

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def openapi(tmp_path_factory) -> dict:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("docs"))).openapi()


def test_every_setting_is_documented_with_its_default():
    page = (ROOT / "docs/operations.md").read_text()

    rows = dict(re.findall(r"^\| `(KEYSLICE_\w+)` \| (?:`(.*?)`)? ?\|", page, re.MULTILINE))

    expected = {f"KEYSLICE_{name.upper()}": field.default for name, field in Settings.model_fields.items()}
    assert rows == {name: "" if default is None else str(default) for name, default in expected.items()}


def test_every_call_is_documented(openapi):
    page = (ROOT / "docs/api.md").read_text()

    documented = {(method, path) for method, path in re.findall(r"^\| `([A-Z]+) ([^`?]+)", page, re.MULTILINE)}

    offered = {
        (method.upper(), re.sub(r":path", "", path)) for path, calls in openapi["paths"].items() for method in calls
    }
    assert documented == offered


def test_every_command_is_documented_as_its_help_says(tmp_path):
    page = tmp_path / "commands.md"
    options = ["--name", "keyslice", "--title", "The command line", "--output", str(page)]
    subprocess.run([sys.executable, "-m", "typer", "service.cli", "utils", "docs", *options], check=True, cwd=ROOT)

    assert (ROOT / "docs/commands.md").read_text() == page.read_text(), (
        f"make it anew: typer service.cli utils docs {' '.join(options[:4])} --output docs/commands.md"
    )


def test_every_command_has_an_example():
    page = (ROOT / "docs/commands.md").read_text()
    commands = page.split("\n## ")[1:]
    parts = [part for command in commands for part in command.split("\n### ")]

    wanting = [part.splitlines()[0] for part in parts if "**Commands**" not in part and "Example: " not in part]

    assert len(parts) > 20
    assert wanting == []


def test_every_metric_is_documented_and_rules_and_dashboard_ask_for_no_other():
    told = set(re.findall(r'"(keyslice_\w+)"', (ROOT / "service/metrics.py").read_text()))
    page = (ROOT / "docs/operations.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `keyslice_")]
    assert {name for row in rows for name in re.findall(r"`(keyslice_\w+)", row)} == told

    rules = yaml.safe_load((ROOT / "docs/monitoring/alerts.yml").read_text())["groups"][0]["rules"]
    panels = json.loads((ROOT / "docs/monitoring/dashboard.json").read_text())["panels"]
    asked = [rule["expr"] for rule in rules] + [target["expr"] for panel in panels for target in panel["targets"]]
    names = {name for expression in asked for name in re.findall(r"keyslice_\w+", expression)}

    assert len(rules) > 8
    assert {re.sub(r"_(bucket|count)$", "", name) for name in names} - {"keyslice_http_request_seconds"} <= told


def test_every_reason_is_documented():
    page = (ROOT / "docs/dicom.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == {str(reason) for reason in Reason}


def test_the_conformance_statement_has_the_classes_and_syntaxes_that_are_negotiated():
    page = (ROOT / "docs/dicom-conformance.md").read_text()
    said = re.findall(r"^\| ([^|]+) \| ([\d.]+) \|(?: (SCP|SCU) \|)?$", page, re.MULTILINE)

    taken = {(UID(each).name, str(each), "SCP") for each in [Verification, *STORAGE]}
    sent = {(each.name, str(each), "SCU") for each in (uid.KeyObjectSelectionDocumentStorage, uid.EnhancedSRStorage)}
    syntaxes = {(UID(each).name, str(each), "") for each in DECODERS}
    assert set(said) == taken | sent | syntaxes


def test_every_case_of_the_table_has_its_test():
    page = (ROOT / "docs/dicom.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    there = {
        name for path in (ROOT / "tests").glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }

    assert len(named) > 30
    assert named <= there


def test_every_encoder_is_documented():
    page = (ROOT / "docs/encoders.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(ENCODERS) | set(WAYS)


def test_every_link_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_sums_of_a_million_series_are_right():
    page = (ROOT / "docs/scale.md").read_text()
    rows = re.findall(r"\| `([^`]+)` \| ([\d.,]+) ?([kMGT]?)", page)
    units = {"": 1, "M": 1e6, "G": 1e9, "T": 1e12}

    told = {expression: float(value.replace(",", "")) * units[unit] for expression, value, unit in rows}

    sums = {expression: eval(expression.replace("×", "*").replace(",", "")) for expression in told}
    assert len(told) > 15
    assert told == pytest.approx(sums, rel=0.005)


def test_every_kind_of_error_is_documented_with_its_status(tmp_path):
    page = (ROOT / "docs/errors.md").read_text()
    said = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (.*) \|$", page, re.MULTILINE)
    example = json.loads(re.search(r"```json\n(.*?)```", page, re.DOTALL)[1])
    settings = Settings(data_dir=tmp_path, broker_url="memory://")

    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as http:
        answer = http.get("/v1/series/1.2.3").json()

    statuses = {
        kind: next((STATUSES[each] for each in error.__mro__ if each in STATUSES), None)
        for kind, error in kinds().items()
    }
    assert {(kind, int(status), when) for kind, status, when in said} - {
        (
            "invalid-request",
            422,
            f"The request does not match the schema; `errors` says where, {MOST_ERRORS} of them. "
            "Below `/dicom-web`, and of a body that cannot be parsed, 400.",
        ),
        ("request-timeout", 408, "A body that stands still, or takes too long."),
    } == {
        (kind, status, kinds()[kind].__doc__.partition("\n")[0])
        for kind, status in statuses.items()
        if status and kind != "invalid-request"
    }
    assert answer == example


def test_every_option_of_a_head_is_documented_with_its_default():
    page = (ROOT / "docs/heads.md").read_text()
    table = page[page.index("| option | default |") : page.index("## Protocols")]
    said = {}
    for names, values in re.findall(r"^\| (`.*?) \| (.*?) \|", table, re.MULTILINE):
        said |= dict(zip(re.findall(r"`(\w+)`", names), values.replace("`", "").split(", "), strict=False))

    written = {"true": "True", "none": "()", "1e-4": "0.0001"}
    told = {name: written.get(value, value) for name, value in said.items()}

    defaults = {name: str(value) for name, value in vars(HeadOptions()).items()}
    assert told.keys() - {"encoder", "splits_of", "name"} == defaults.keys()
    assert told | defaults | {"permutations": told["permutations"]} == told  # whose default is the table's size's


def test_every_bench_is_documented():
    benches = {path.name for path in (ROOT / "bench").glob("*.py") if "__main__" in path.read_text()}
    page = (ROOT / "docs/performance.md").read_text()

    assert set(re.findall(r"^\| `python bench/(\w+\.py)` \|", page, re.MULTILINE)) == benches


def test_the_walk_is_ten_files():
    walk = re.findall(r"^\d+\. \[([\w/.]+)\]", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(walk) == 10
    assert all((ROOT / path).is_file() for path in walk)


def test_answers_are_problems_in_the_schema_too(openapi):
    for path, calls in openapi["paths"].items():
        for method, call in calls.items():
            content = call["responses"]["4XX"]["content"]
            assert list(content) == ["application/problem+json"], (method, path)
            assert "422" not in call["responses"]


def test_numpy_reads_a_bag_by_the_docs_own_lines(tmp_path):
    import numpy as np

    from service.storage.bags import Bags
    from service.storage.folder import Folder
    from service.storage.keys import EmbeddingKey

    stored = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float16)
    Bags(Folder(tmp_path)).put(EmbeddingKey("1.2", "toy@0"), "c0", stored, {})
    lines = re.search(r"```python\n(.*?)```", (ROOT / "docs/storage.md").read_text(), re.DOTALL)[1]

    names = {"bag": str(tmp_path / "toy@0" / "1.2" / "c0.zarr")}
    exec(lines, names)

    assert np.array_equal(names["embeddings"], stored)


def test_each_format_of_features_is_read_by_the_docs_own_lines(tmp_path, monkeypatch):
    import numpy as np

    from service.features.bags import FeatureBag
    from service.features.formats import FORMATS

    vectors = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float16)
    receipt = {"sop_uids": ["1", "2", "3"], "z_mm": [0.0, 2.5, 5.0], "geometry": {"slice_spacing_mm": 2.5}}
    bag = FeatureBag("1.2.3", "1.2", "p", "CHEST", "GE", "A1", "STD", ["abdomen", "lung"], vectors, receipt)
    about = {"encoder_id": "toy@0", "windows": ["abdomen", "lung"], "dim": 4}
    for form in FORMATS.values():
        (tmp_path / f"cohort{form.suffix}").write_bytes(b"".join(form.write([bag], about, 4, tmp_path)))
    zipfile.ZipFile(tmp_path / "cohort.zip").extractall(tmp_path)
    monkeypatch.chdir(tmp_path)

    found = []
    for lines in re.findall(r"```python\n(.*?)```", (ROOT / "docs/features.md").read_text(), re.DOTALL):
        names: dict = {}
        exec(lines, names)
        found.append(next(names[name] for name in ("vectors", "lung", "embeddings") if name in names))

    assert len(found) == len(FORMATS)
    for each in found[:3]:
        np.testing.assert_array_equal(each, vectors.reshape(-1, 4))
    np.testing.assert_array_equal(found[3], vectors[:, 1])
    np.testing.assert_array_equal(found[4], vectors)
