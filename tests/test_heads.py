"""Heads over HTTP and by the command: tables with gaps, protocols, comparisons, the report."""

import copy
import csv
import io
import json
import threading
import time

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from posting import wait
from typer.testing import CliRunner

from models.ct.phantom import Identity
from models.zoo import DEFAULT_ENCODER, ENCODERS
from service.app import create_app
from service.cli import app
from service.comparisons import compare_heads
from service.errors import HeadsDiffer
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from service.storage.tables import HeadRow
from service.training import command_of
from workers import pipeline
from workers.resources import Resources

FAST = {"batch_size": "8", "learning_rate": "1e-3", "epochs": "3", "hidden": "16", "attention": "8"}
PATIENTS = 12
BRIGHT = [k % 2 for k in range(PATIENTS)]


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """The stores and a worker over them, without an encoder: bags are put where an encoder would put them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other are slow on a busy machine
    settings = Settings(data_dir=tmp_path_factory.mktemp("heads"), broker_url="memory://", sweep_seconds=1e6)
    opened = Resources(settings)
    yield opened
    opened.close()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def address(worker):
    """The API over HTTP, and a thread that trains what it is asked for."""
    server = uvicorn.Server(uvicorn.Config(create_app(worker.settings), port=0, log_level="warning"))
    done = threading.Event()

    def train_what_waits():
        while not done.wait(0.05):
            for row in worker.stores.heads.list(after=None, limit=1000):
                if row.state in ("received", "queued"):
                    pipeline.train_head(row.head_id, worker)

    threads = [threading.Thread(target=server.run), threading.Thread(target=train_what_waits)]
    for thread in threads:
        thread.start()
    while not server.started:
        assert threads[0].is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    done.set()
    for thread in threads:
        thread.join()


@pytest.fixture(scope="module")
def http(address):
    with httpx.Client(base_url=address, timeout=120) as client:
        yield client


def embedded(worker, identity, positive, seed):
    """A series of three slices with a bag; a positive one lies elsewhere."""
    spec = ENCODERS[DEFAULT_ENCODER]
    key = EmbeddingKey(identity.series_uid, worker.own_encoder_id())
    catalog = worker.stores.catalog
    catalog.receive([Arrival(key.series_uid, identity.study_uid, identity.patient_id)], key.encoder_id)
    assert catalog.claim(key, "test", 60, 3)
    bag = np.random.default_rng(seed).normal(positive, 1, (3, 2, spec.dim)).astype(np.float16)
    content = worker.stores.archive.content(key.series_uid)[0]
    worker.stores.bags.put(key, content, bag, {})
    catalog.commit(key, content, len(bag), {}, {})


@pytest.fixture(scope="module")
def names(worker):
    """Twelve patients, every second one positive."""
    identities = [Identity(f"COHORT-{number}") for number in range(PATIENTS)]
    for k, each in enumerate(identities):
        embedded(worker, each, k % 2, k)
    return [each.patient_id for each in identities]


def table(*columns, header):
    text = io.StringIO()
    csv.writer(text).writerows([header, *zip(*columns, strict=True)])
    return text.getvalue().encode()


def train(http, labels, **options):
    """(what the POST said, the head when its training has ended)."""
    answer = http.post("/v1/heads", files={"labels": labels}, data=FAST | options)
    assert answer.status_code == 202, answer.text
    wait(http, answer.json()["job_id"])
    return answer.json(), http.get(f"/v1/heads/{answer.json()['head_id']}").json()


@pytest.fixture(scope="module")
def head(http, names):
    labels = table(names, BRIGHT, ["", *[k // 6 for k in range(1, PATIENTS)]], header=["patient_id", "bright", "late"])
    return train(http, labels, folds="2", baselines=["mean", "probe"])[1]


def test_the_report_holds_every_key_of_its_page(head):
    documented = {
        "report_version", "task", "by", "options", "patients", "bags", "cohort", "warnings", "protocol", "evaluated",
        "folds", "outer_folds", "validation", "test", "average", "operating", "attention", "baselines", "permutation",
        "splits", "rows", "encoder_id", "code_version", "versions", "command", "table", "note",
    }  # fmt: skip

    report = head["report"]

    assert set(report) == documented
    assert [*report["attention"]["by_window"]] == ["abdomen", "lung"]
    assert report["cohort"]["labels"]["late"] == {"positive": 6, "negative": 5, "unknown": 1}
    assert report["rows"]["line"] == list(range(2, PATIENTS + 2))
    assert report["table"]["lines"] == PATIENTS + 1
    assert report["permutation"]["draws"] == 1  # a small set
    assert [*report["baselines"]] == ["mean", "probe"]
    assert "--baseline mean --baseline probe" in report["command"]
    assert not any(f"COHORT-{k}" in json.dumps(report) for k in range(PATIENTS))


def test_lists_leave_out_what_is_long(http, head):
    listed = {each["head_id"]: each for each in http.get("/v1/heads?limit=1000").json()["heads"]}

    assert set(head["report"]) - set(listed[head["head_id"]]["report"]) == {"rows", "splits"}


def test_unknown_patients_are_listed_by_line_and_the_rest_is_used(http, names):
    labels = table(["NOBODY", *names], [1, *BRIGHT], header=["patient_id", "bright"])

    accepted, head = train(http, labels, folds="2", permutations="0")

    assert [(each["code"], each["lines"]) for each in accepted["warnings"]] == [("not_here", [2])]
    assert head["report"]["warnings"] == accepted["warnings"]
    assert (head["state"], head["report"]["bags"]) == ("ready", PATIENTS)
    assert "NOBODY" not in json.dumps([accepted, head])


@pytest.mark.parametrize("by", ["study", "series"])
def test_labels_may_be_of_studies_and_series(http, names, by):
    column = f"{by}_uid"
    labels = table([getattr(Identity(name), column) for name in names], BRIGHT, header=[column, "bright"])

    _, head = train(http, labels, folds="2", permutations="0", task="binary", epochs="1")

    assert (head["report"]["by"], head["report"]["bags"]) == (by, PATIENTS)


def test_a_split_column_holds_out_its_test_part(http, names):
    split = ["test" if k >= 8 else "" for k in range(PATIENTS)]
    labels = table(names, BRIGHT, split, header=["patient_id", "bright", "split"])

    _, head = train(http, labels, folds="2", permutations="0")

    assert head["report"]["protocol"] == "holdout"
    assert [part == "test" for part in head["report"]["rows"]["part"]] == [each == "test" for each in split]
    assert head["report"]["test"]["bright"]["bags"] == 4


def test_a_patient_on_both_sides_of_a_split_is_refused(http, worker, names):
    identity = Identity(names[0], series="2")
    embedded(worker, identity, 0, 99)
    series = [*(Identity(name).series_uid for name in names), identity.series_uid]
    split = ["test", *["train"] * PATIENTS]
    labels = table(series, [*BRIGHT, 0], split, header=["series_uid", "bright", "split"])

    answer = http.post("/v1/heads", files={"labels": labels}, data=FAST)

    assert answer.status_code == 422
    assert "2 rows of the labels table put one patient into several splits: row 2, 14" in answer.json()["detail"]


def test_splits_are_used_again_in_whatever_order_the_table_is(http, names, head):
    labels = table(names[::-1], BRIGHT[::-1], header=["patient_id", "bright"])

    _, again = train(http, labels, splits_of=head["head_id"], network="gated_abmil", permutations="0")

    assert again["report"]["rows"]["part"] == head["report"]["rows"]["part"][::-1]
    found = http.get(f"/v1/heads/{again['head_id']}/comparison", params={"with": head["head_id"]}).json()
    assert [*found["labels"]] == ["bright"]
    said = found["labels"]["bright"]
    assert (said["bags"], said["patients"], found["evaluated"]) == (PATIENTS, PATIENTS, "validation")
    assert said["auroc"]["a"] == again["report"]["validation"]["bright"]["auroc"]["value"]
    assert said["auroc"]["b"] == head["report"]["validation"]["bright"]["auroc"]["value"]
    assert said["delong"]["difference"] == said["auroc"]["difference"]


def test_heads_on_other_patients_or_labels_are_not_compared(worker, head):
    row = worker.stores.heads.get(head["head_id"])

    def other(labels=tuple(row.labels), **targets):
        changed = copy.deepcopy(row.targets) | targets
        return HeadRow(head_id="other", labels=list(labels), options=row.options, report=row.report, targets=changed)

    turned = [[key, uids, [cells[0] ^ 1, cells[1]]] for key, uids, cells in row.targets["rows"]]
    for different, found in (
        (other(units=["somebody", *row.targets["units"][1:]]), "11 of 12 and 12"),
        (other(rows=turned), "other values"),
        (other(labels=["dark", "early"]), "no label in common"),
        (HeadRow(head_id="old", labels=row.labels, options={}, report={}, targets={}), "train it again"),
    ):
        with pytest.raises(HeadsDiffer, match=found):
            compare_heads(row, different)
    assert compare_heads(row, other())["labels"]["bright"]["auroc"]["difference"] == 0.0


def test_too_few_patients_for_nested_folds_fail_with_the_reason_and_leave_no_head(http, names):
    labels = table(names[:4], BRIGHT[:4], header=["patient_id", "bright"])

    _, head = train(http, labels, protocol="nested", folds="2", permutations="0")

    assert head["state"] == "failed"
    assert "expected at least 2 of each class" in head["error"]
    assert http.get(f"/v1/heads/{head['head_id']}/weights").status_code == 409


def test_the_command_trains_shows_and_writes(address, names, tmp_path):
    labels, output = tmp_path / "labels.csv", tmp_path / "head.json"
    labels.write_bytes(table(["NOBODY", *names], [1, *BRIGHT], header=["patient_id", "bright"]))
    words = ["train", str(labels), "--service", address, "--output", str(output), "--folds", "2"]
    words += ["--epochs", "2", "--baseline", "mean", "--no-temperature-scaling", "--permutations", "1"]

    answer = CliRunner().invoke(app, words)

    assert answer.exit_code == 0, answer.output
    assert "1 rows of the labels table name a patient that is not here: row 2" in answer.output
    assert "bright" in answer.output and "baseline mean" in answer.output and "labels shuffled" in answer.output
    head = json.loads(output.read_text())
    assert head["options"]["baselines"] == ["mean"]
    assert head["options"]["temperature_scaling"] is False
    assert head["report"]["operating"]["bright"]["temperature"] == 1.0
    assert "--no-temperature-scaling" in head["report"]["command"]


def test_the_command_says_what_the_service_refuses(address, tmp_path):
    labels = tmp_path / "labels.csv"
    labels.write_text("patient_id,x\nNOBODY,1\n")

    refused = CliRunner().invoke(app, ["train", str(labels), "--service", address])
    away = CliRunner().invoke(app, ["train", str(labels), "--service", "http://127.0.0.1:9"])

    assert (refused.exit_code, away.exit_code) == (1, 1)
    assert "422" in refused.output and "row 2" in refused.output and "NOBODY" not in refused.output
    assert "keyslice up" in away.output


def test_the_command_of_a_training_names_what_is_not_the_default():
    options = {"epochs": 64, "seed": 0, "baselines": ["mean", "probe"], "temperature_scaling": False, "splits_of": None}
    defaults = {"epochs": 32, "seed": 0, "baselines": (), "temperature_scaling": True}

    assert command_of(options, defaults) == (
        "keyslice train labels.csv --epochs 64 --baseline mean --baseline probe --no-temperature-scaling"
    )
