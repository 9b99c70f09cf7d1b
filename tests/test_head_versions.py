"""Versions of a head, predictions that are given again, trainings that are cancelled or taken up."""

import copy
import threading
import time

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from serving import client_over
from sqlalchemy import inspect
from typer.testing import CliRunner

from models.heads.options import HeadOptions
from models.heads.train import LabelledBag, train_head
from service import training
from service.app import create_app
from service.cli import app
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from workers import pipeline
from workers.resources import Resources

ENCODER = "efficientnet_lite0@0123456789ab"
FAST = {"batch_size": "8", "learning_rate": "1e-3", "epochs": "2", "hidden": "8", "attention": "4", "folds": "2"}
FAST |= {"permutations": "0"}
PATIENTS = 8
DIM = 1280


@pytest.fixture
def worker(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    opened = Resources(Settings(data_dir=tmp_path / "data", broker_url="memory://", sweep_seconds=1e6))
    yield opened
    opened.close()
    torch.set_num_threads(threads)


@pytest.fixture
def http(worker):
    with TestClient(create_app(worker.settings)) as client:
        yield client


@pytest.fixture
def patients(worker):
    """Patients with one embedded series each: (patient id, series UID)."""
    found = [(f"PATIENT-{k}", f"1.2.{k}") for k in range(PATIENTS)]
    for k, (patient, uid) in enumerate(found):
        embed(worker, patient, uid, slices=4, positive=k % 2, content=f"first{k}")
    return found


def embed(worker, patient, uid, slices, positive, content):
    """A bag where a worker would have put one."""
    stores, key = worker.stores, EmbeddingKey(uid, encoder(worker))
    stores.catalog.receive([Arrival(uid, f"{uid}.1", patient)], key.encoder_id)
    random = np.random.default_rng(slices)
    bag = (random.normal(size=(slices, 2, DIM)) + positive).astype(np.float16)
    receipt = {
        "kind": "slice2d",
        "windows": ["abdomen", "lung"],
        "sop_uids": [f"{uid}.2.{k}" for k in range(slices)],
        "z_mm": [float(k) for k in range(slices)],
    }
    stores.bags.put(key, content, bag, receipt)
    stores.catalog.commit(key, content, slices, {"status": "accepted", "findings": [], "set_aside": []}, {})
    stores.bags.keep_only(key, {content, *stores.predictions.contents(key)})


def encoder(worker):
    return worker.own_encoder_id()


def post(http, patients, **options):
    rows = "".join(f"{patient},{k % 2}\n" for k, (patient, _) in enumerate(patients))
    answer = http.post("/v1/heads", files={"labels": f"patient_id,bright\n{rows}"}, data=FAST | options)
    assert answer.status_code == 202, answer.text
    return answer.json()


def train(http, worker, patients, **options):
    accepted = post(http, patients, **options)
    pipeline.train_head(accepted["head_id"], worker)
    head = http.get(f"/v1/heads/{accepted['head_id']}").json()
    assert head["state"] == "ready", head
    return head


def predict(http, head, patient="PATIENT-1"):
    return http.get(f"/v1/patients/{patient}/predictions", params={"head": head})


def test_a_name_means_its_first_version_until_another_is_promoted(http, worker, patients):
    first = train(http, worker, patients, name="nodule")
    second = train(http, worker, patients, name="nodule", seed="1")

    assert [(each["name"], each["version"], each["promoted"]) for each in (first, second)] == [
        ("nodule", 1, True),
        ("nodule", 2, False),
    ]
    assert "--name nodule" in second["report"]["command"]
    assert predict(http, "nodule").json()["head_id"] == first["head_id"]
    assert predict(http, "nodule@2").json()["head_id"] == second["head_id"]
    assert predict(http, second["head_id"]).json()["head_version"] == 2

    promoted = http.post("/v1/heads/nodule@2/promote")

    assert promoted.status_code == 200 and promoted.json()["promoted"]
    answer = predict(http, "nodule").json()
    assert (answer["head_id"], answer["head_name"], answer["head_version"]) == (second["head_id"], "nodule", 2)
    assert not http.get("/v1/heads/nodule@1").json()["promoted"]


def test_a_head_is_looked_up_without_its_megabytes(http, worker, patients):
    head_id = train(http, worker, patients)["head_id"]

    assert inspect(worker.stores.heads.ready(head_id)).unloaded == {"weights", "graph"}
    assert worker.stores.heads.weights(head_id)
    assert worker.stores.heads.graph(head_id)


def test_a_head_without_a_name_goes_by_its_id(http, worker, patients):
    head = train(http, worker, patients)

    assert (head["name"], head["version"], head["promoted"]) == (head["head_id"], 1, True)
    assert "--name" not in head["report"]["command"]
    assert predict(http, f"{head['head_id']}@1").json()["head_id"] == head["head_id"]


@pytest.mark.parametrize("reference", ["other", "nodule@2", "nodule@", "nodule@-1", "nodule@one", "@1", "nodule@²"])
def test_a_version_that_is_not_there_is_not_found(http, worker, patients, reference):
    train(http, worker, patients, name="nodule")

    assert predict(http, reference).status_code == 404
    assert http.post(f"/v1/heads/{reference}/promote").status_code == 404


def test_a_version_in_training_or_failed_is_not_promoted(http, worker, patients):
    train(http, worker, patients, name="nodule")
    post(http, patients, name="nodule")

    refused = http.post("/v1/heads/nodule@2/promote")

    assert refused.status_code == 409
    assert "expected ready" in refused.json()["detail"]
    assert http.get("/v1/heads/nodule@1").json()["promoted"]


@pytest.mark.parametrize("name", ["Nodule", "a b", "", "a@1", "-a", "x" * 65])
def test_a_name_is_of_few_characters(http, patients, name):
    answer = http.post("/v1/heads", files={"labels": "patient_id,bright\nPATIENT-0,1\n"}, data=FAST | {"name": name})

    assert answer.status_code == 422


def test_versions_that_are_posted_at_once_get_numbers_of_their_own(stores):
    with_names = []
    threads = [
        threading.Thread(target=lambda: with_names.append(stores.heads.add(ENCODER, ["x"], {}, {}, "nodule")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(row.version for row in stores.heads.list(after=None, limit=10)) == [1, 2]


def test_versions_that_end_at_once_leave_one_promoted(stores):
    heads = [stores.heads.add(ENCODER, ["x"], {}, {}, "nodule")[1] for _ in range(4)]
    threads = [threading.Thread(target=stores.heads.commit, args=(head, b"", b"", {})) for head in heads]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(stores.heads.get(head).promoted for head in heads) == 1


def test_a_prediction_names_what_it_was_made_of_and_is_given_again(http, worker, patients):
    head = train(http, worker, patients, name="nodule")

    answer = predict(http, "nodule").json()
    same = predict(http, "nodule").json()
    again = http.get(f"/v1/predictions/{answer['prediction_id']}")

    assert answer == same == again.json()
    assert answer["bags"] == {"1.2.1": "first1"}
    assert (answer["head_id"], answer["encoder_id"]) == (head["head_id"], encoder(worker))


def test_a_prediction_stays_as_it_was_when_slices_come_and_another_version_is_promoted(http, worker, patients):
    train(http, worker, patients, name="nodule")
    before = predict(http, "nodule").json()
    train(http, worker, patients, name="nodule", seed="1")
    http.post("/v1/heads/nodule@2/promote")
    embed(worker, *patients[1], slices=7, positive=0, content="second")

    now = predict(http, "nodule").json()

    assert now["prediction_id"] != before["prediction_id"]
    assert now["bags"] == {"1.2.1": "second"} and now["probabilities"] != before["probabilities"]
    assert http.get(f"/v1/predictions/{before['prediction_id']}").json() == before
    assert http.get(f"/v1/predictions/{now['prediction_id']}").json() == now


def test_bags_that_no_prediction_was_made_of_are_replaced(http, worker, patients):
    train(http, worker, patients, name="nodule")
    embed(worker, *patients[2], slices=7, positive=0, content="second")

    with pytest.raises(FileNotFoundError):
        worker.stores.bags.get(EmbeddingKey("1.2.2", encoder(worker)), "first2")


def test_a_prediction_whose_bag_is_gone_says_so_and_an_unknown_one_is_not_found(http, worker, patients):
    train(http, worker, patients, name="nodule")
    answer = predict(http, "nodule").json()
    worker.stores.bags.keep_only(EmbeddingKey("1.2.1", encoder(worker)), ["another"])

    gone = http.get(f"/v1/predictions/{answer['prediction_id']}")

    assert (gone.status_code, gone.json()["type"]) == (409, "urn:keyslice:bag-gone")
    assert http.get("/v1/predictions/0123").status_code == 404


def test_a_training_that_waits_is_cancelled_and_never_begins(http, worker, patients):
    accepted = post(http, patients)

    answer = http.post(f"/v1/jobs/{accepted['job_id']}/cancel")
    pipeline.train_head(accepted["head_id"], worker)

    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    head = http.get(f"/v1/heads/{accepted['head_id']}").json()
    assert (head["state"], head["report"]) == ("cancelled", None)
    assert predict(http, accepted["head_id"]).status_code == 409


def test_a_training_in_progress_is_cancelled_between_two_epochs(http, worker, patients, monkeypatch):
    monkeypatch.setattr(pipeline, "PROGRESS_SECONDS", 0.0)
    accepted = post(http, patients, epochs="10000", patience="10000")
    thread = threading.Thread(target=pipeline.train_head, args=(accepted["head_id"], worker))
    thread.start()
    while http.get(f"/v1/jobs/{accepted['job_id']}").json()["done"] < 2:
        time.sleep(0.02)

    http.post(f"/v1/jobs/{accepted['job_id']}/cancel")
    thread.join(timeout=60)

    assert not thread.is_alive()
    job = http.get(f"/v1/jobs/{accepted['job_id']}").json()
    assert (job["state"], job["error"]) == ("cancelled", "cancelled on request")
    assert http.get(f"/v1/heads/{accepted['head_id']}").json()["state"] == "cancelled"


def test_a_training_whose_worker_is_told_to_end_goes_back_and_does_not_count_as_tried(
    http, worker, patients, monkeypatch
):
    monkeypatch.setattr(pipeline, "PROGRESS_SECONDS", 0.0)
    accepted = post(http, patients)
    for _ in range(worker.settings.max_attempts + 1):
        thread = threading.Thread(target=pipeline.train_head, args=(accepted["head_id"], worker))
        thread.start()
        while thread.is_alive() and worker.stores.heads.get(accepted["head_id"]).state != "training":
            time.sleep(0.001)
        worker.stopping.set()
        thread.join(timeout=60)
        worker.stopping.clear()
    before = worker.stores.heads.get(accepted["head_id"])

    pipeline.train_head(accepted["head_id"], worker)

    assert (before.state, before.error, before.attempts) == ("received", "InterruptedError", 0)
    assert http.get(f"/v1/heads/{accepted['head_id']}").json()["state"] == "ready"


def test_a_worker_that_ends_a_cancelled_training_does_not_bring_it_back(http, worker, patients):
    accepted = post(http, patients)
    http.post(f"/v1/jobs/{accepted['job_id']}/cancel")

    worker.stores.heads.commit(accepted["head_id"], b"", b"", {})
    worker.stores.heads.fail(accepted["head_id"], "late")

    assert http.get(f"/v1/heads/{accepted['head_id']}").json()["state"] == "cancelled"


def test_cancelling_what_has_ended_changes_nothing_and_an_unknown_job_is_not_found(http, worker, patients):
    accepted = post(http, patients)
    pipeline.train_head(accepted["head_id"], worker)

    assert http.post(f"/v1/jobs/{accepted['job_id']}/cancel").json()["state"] == "done"
    assert http.get(f"/v1/heads/{accepted['head_id']}").json()["state"] == "ready"
    assert http.post("/v1/jobs/nobody/cancel").status_code == 404


def test_an_upload_is_cancelled_where_no_worker_has_begun_and_begins_anew_when_it_is_posted_again(stores):
    arrivals = [Arrival(f"1.2.{k}", "1.2", "A") for k in range(3)]
    job = stores.catalog.receive(arrivals, ENCODER)
    stores.catalog.claim(EmbeddingKey("1.2.0", ENCODER), "worker", 60, 3)

    stores.catalog.cancel(job)

    assert [stores.catalog.series(f"1.2.{k}").state for k in range(3)] == ["embedding", "failed", "failed"]
    assert stores.catalog.series("1.2.1").error == "cancelled on request"
    assert stores.catalog.waiting(job) == []
    again = stores.catalog.receive(arrivals[1:], ENCODER)
    assert stores.catalog.waiting(again) == [EmbeddingKey("1.2.1", ENCODER), EmbeddingKey("1.2.2", ENCODER)]


class Dies(Exception):
    """A worker's end."""


def test_a_training_that_is_taken_up_trains_no_network_twice_and_comes_to_the_same_head(worker, patients, http):
    whole = train(http, worker, patients, baselines=["mean"], permutations="1")
    accepted = post(http, patients, baselines=["mean"], permutations="1")
    heads = worker.stores.heads
    kept_by = type(heads.networks("", ""))
    trained = []

    def die_at_the_third(self, name, network, keep=kept_by.__setitem__):
        trained.append(name)
        keep(self, name, network)
        if len(trained) == 3:
            raise OSError("the disk was away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_by, "__setitem__", die_at_the_third)
        pipeline.train_head(accepted["head_id"], worker)
        handed_back = heads.get(accepted["head_id"])
        pipeline.train_head(accepted["head_id"], worker)

    assert (handed_back.state, handed_back.error, handed_back.attempts) == ("received", "OSError", 1)
    again = http.get(f"/v1/heads/{accepted['head_id']}").json()
    assert trained == ["head 0", "head 1", "baseline mean 0", "baseline mean 1", "shuffled 0 0", "shuffled 0 1"]
    weights = [http.get(f"/v1/heads/{each['head_id']}/weights").content for each in (whole, again)]
    assert weights[0] == weights[1]
    assert again["report"] == whole["report"]
    assert heads.networks(accepted["head_id"], "").get("head 0") is None
    with worker.stores.database.read() as session:
        assert session.connection().exec_driver_sql("SELECT count(*) FROM head_networks").scalar() == 0


def test_networks_of_other_bags_are_not_taken_up(worker, patients, http, monkeypatch):
    accepted = post(http, patients)
    kept_by = type(worker.stores.heads.networks("", ""))
    keep, trained = kept_by.__setitem__, []

    def die_once(self, name, network):
        keep(self, name, network)
        trained.append(name)
        if len(trained) == 1:
            raise OSError("the disk was away")

    monkeypatch.setattr(kept_by, "__setitem__", die_once)
    pipeline.train_head(accepted["head_id"], worker)
    embed(worker, *patients[3], slices=7, positive=1, content="second")
    pipeline.train_head(accepted["head_id"], worker)

    assert trained == ["head 0", "head 0", "head 1"]


def test_kept_networks_come_back_to_the_bit_with_their_reports():
    random = np.random.default_rng(0)
    bags = [
        LabelledBag(str(k), (float(k % 2),), lambda k=k: (random.normal(size=(3, 2, 6)) + k % 2).astype(np.float16))
        for k in range(8)
    ]
    fixed = [bag.load() for bag in bags]
    bags = [LabelledBag(bag.patient, bag.target, lambda k=k: fixed[k]) for k, bag in enumerate(bags)]
    options = HeadOptions(folds=2, epochs=2, batch_size=4, hidden=8, attention=4, network="gated_abmil")
    kept = {}

    whole = train_head(bags, ["x"], options, lambda done, known: None, kept=kept)
    epochs = []
    again = train_head(bags, ["x"], options, lambda done, known: epochs.append(done), kept=copy.deepcopy(kept))

    assert [*kept] == ["head 0", "head 1"]
    assert epochs == []
    assert again.report == whole.report
    for name, tensor in whole.ensemble.state_dict().items():
        assert torch.equal(tensor, again.ensemble.state_dict()[name])


def test_the_command_lists_and_promotes(http, worker, patients, monkeypatch):
    train(http, worker, patients, name="nodule")
    train(http, worker, patients, name="nodule", seed="1")
    monkeypatch.setattr("service.client.Keyslice", lambda *_, **__: client_over(http))

    listed = CliRunner().invoke(app, ["heads"])
    promoted = CliRunner().invoke(app, ["heads", "promote", "nodule@2"])
    refused = CliRunner().invoke(app, ["heads", "promote", "nodule@3"])

    assert "nodule@1 (promoted)" in listed.output and "nodule@2" in listed.output
    assert promoted.exit_code == 0 and "nodule is version 2" in promoted.output
    assert refused.exit_code == 1 and "404" in refused.output


def test_ctrl_c_cancels_the_training(http, patients, tmp_path, monkeypatch):
    labels = tmp_path / "labels.csv"
    labels.write_text("patient_id,bright\n" + "".join(f"{name},{k % 2}\n" for k, (name, _) in enumerate(patients)))

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_watch", interrupted)
    monkeypatch.setattr("service.client.Keyslice", lambda *_, **__: client_over(http))
    answer = CliRunner().invoke(app, ["train", str(labels), "--permutations", "0"])

    assert answer.exit_code == 1 and "cancelled on request" in answer.output
    assert [each["state"] for each in http.get("/v1/heads").json()["heads"]] == ["cancelled"]
