"""`keyslice check`: every way in which the stores may disagree is told, and what can be mended is."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from archived import archived, archived_file
from posting import slice_files
from searching import ENCODER, random_bag, three_indexed
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service import consistency
from service.cli import app
from service.intake import take_in
from service.settings import Settings
from service.storage.inspection import LOST_BAG
from service.storage.keys import EmbeddingKey
from service.storage.staging import staging
from service.uploads import StagedFile

LEFT = 3
SENT = Identity("CHECKED")
KEY = EmbeddingKey("1.2.0", ENCODER)


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Three series, indexed, and one that was sent and waits."""
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path))
    opened = three_indexed(Settings())
    send(opened, Settings())
    age(tmp_path)
    yield opened
    opened.close()


def send(stores, settings):
    with staging(settings.staging_dir) as folder:
        staged = [StagedFile(folder / name, name) for name, _ in slice_files(SENT, count=3)]
        for each, (_, content) in zip(staged, slice_files(SENT, count=3), strict=True):
            each.path.write_bytes(content)
        take_in(staged, folder, ENCODER, stores, settings)


def age(folder):
    """As if nothing had been touched for an hour."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))


def check(*options, status=0):
    result = CliRunner().invoke(app, ["check", "--json", *options])
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def differences(*options, status=0):
    return [(each["kind"], each["where"], each["mended"]) for each in check(*options, status=status)["differences"]]


def bag_path(stores, key=KEY):
    content = stores.catalog.embedding(key.series_uid, key.encoder_id).content
    return Settings().data_dir / "bags" / key.encoder_id / key.series_uid / f"{content}.zarr"


def first_file(stores):
    return archived(stores, SENT.series_uid)[0]


def test_stores_that_agree_are_counted(stores):
    assert check() == {"series": 4, "files": 18, "bags": 3, "rows": 30, "differences": []}
    assert "nothing differs" in CliRunner().invoke(app, ["check"]).output


def test_a_file_that_is_gone_is_named_and_left_to_its_sender(stores, tmp_path):
    gone = first_file(stores).stem
    first_file(stores).unlink()
    age(tmp_path)

    wanted = [("file_missing", f"{SENT.series_uid}/{gone}", False)]
    assert differences(status=LEFT) == differences("--repair", status=LEFT) == wanted
    send(stores, Settings())
    assert differences() == []


def test_a_damaged_file_is_found_unless_asked_to_be_quick(stores):
    path = first_file(stores)
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")

    assert differences(status=LEFT) == [("file_damaged", f"{SENT.series_uid}/{path.stem}", False)]
    assert differences("--quick") == []
    send(stores, Settings())
    assert differences() == []


def test_a_file_that_the_catalog_does_not_count_goes(stores, tmp_path):
    left = archived_file(stores, SENT.series_uid, "9.9")
    left.write_bytes(b"DICM")
    age(tmp_path)

    assert differences(status=LEFT) == [("file_unknown", f"{SENT.series_uid}/9.9", False)]
    assert differences("--repair") == [("file_unknown", f"{SENT.series_uid}/9.9", True)]
    assert not left.exists()
    assert differences() == []


def test_a_series_that_nobody_noted_goes(stores, tmp_path):
    folder = tmp_path / "archive" / "1.9"
    folder.mkdir()
    (folder / "1.9.1.dcm").write_bytes(b"DICM")
    assert differences() == []  # it may be on its way
    age(tmp_path)

    assert differences("--repair") == [("file_unknown", "1.9", True)]
    assert not folder.exists()


def test_a_lost_bag_is_made_again(stores):
    shutil.rmtree(bag_path(stores))

    assert differences(status=LEFT) == [("bag_missing", f"{ENCODER}/1.2.0", False)]
    assert differences("--repair") == [("bag_missing", f"{ENCODER}/1.2.0", True)]
    assert stores.catalog.series("1.2.0").state == "received"
    assert KEY in stores.catalog.lost(0.0, queue_is_empty=True)


def test_a_damaged_bag_is_made_again_with_the_same_numbers(stores):
    content = stores.catalog.embedding("1.2.0", ENCODER).content
    chunk = bag_path(stores) / "c" / "0" / "0" / "0"
    chunk.write_bytes(bytes(len(chunk.read_bytes())))

    assert differences("--quick") == []
    assert differences("--repair") == [("bag_damaged", f"{ENCODER}/1.2.0", True)]
    receipt = {"windows": ["abdomen", "lung"], "sop_uids": ["1"] * 5, "z_mm": [0.0] * 5}
    stores.bags.put(KEY, content, random_bag(0), receipt)
    assert np.array_equal(stores.bags.get(KEY, content), random_bag(0))


@pytest.mark.parametrize("verify", ["false", "true"])
def test_a_bag_that_does_not_read_is_named(stores, monkeypatch, verify):
    monkeypatch.setenv("KEYSLICE_VERIFY_READS", verify)
    (bag_path(stores) / "zarr.json").write_text("{")

    assert differences(status=LEFT) == [("bag_damaged", f"{ENCODER}/1.2.0", False)]
    assert CliRunner().invoke(app, ["index", "check"]).exit_code == 0


def test_a_lost_bag_of_a_lost_series_fails_with_its_reason(stores, tmp_path):
    shutil.rmtree(bag_path(stores))
    shutil.rmtree(tmp_path / "archive" / "1.2.0")

    found = differences("--repair", status=LEFT)

    assert found == [("file_missing", "1.2.0", False), ("bag_missing", f"{ENCODER}/1.2.0", False)]
    assert stores.catalog.series("1.2.0").error == LOST_BAG


def test_what_dead_writers_left_of_bags_goes(stores, tmp_path):
    folder = bag_path(stores).parent
    shutil.copytree(bag_path(stores), folder / ".0123.aa")
    shutil.copytree(bag_path(stores), folder / "0123456789abcdef.zarr")
    for path in folder.iterdir():
        os.utime(path)
    assert differences() == []
    age(tmp_path)

    names = {f"{ENCODER}/1.2.0/{name}" for name in (".0123.aa", "0123456789abcdef.zarr")}
    assert {each[1] for each in differences("--repair")} == names
    assert [path.name for path in folder.iterdir()] == [bag_path(stores).name]


def test_rows_that_are_not_as_their_bags_are_written_again(stores):
    lance = stores.index._open(stores.indexes.get(ENCODER).table_name)
    lance.delete("row_id = '1.2.0/3/lung'")
    lance.update(where="row_id = '1.2.2/4/abdomen'", values={"z_mm": 99.0})
    strange = lance.search().where("row_id = '1.2.1/0/lung'").limit(None).to_arrow().to_pandas()
    lance.add(strange.assign(series_uid="1.7", row_id="1.7/0/lung"))

    wrong = [f"{ENCODER}/{uid}" for uid in ("1.2.0", "1.2.2", "1.7")]
    assert differences(status=LEFT) == [("index_rows", where, False) for where in wrong]
    assert [each[1] for each in differences("--quick", status=LEFT)] == [wrong[0], wrong[2]]  # by their number
    assert differences("--repair") == [("index_rows", where, True) for where in wrong]
    assert differences() == []


def test_an_index_that_does_not_read_is_made_anew(stores, tmp_path):
    for path in (tmp_path / "index" / f"{stores.indexes.get(ENCODER).table_name}.lance" / "data").iterdir():
        path.write_bytes(path.read_bytes()[:20])

    assert differences("--repair") == [("index_broken", ENCODER, True)]
    assert check()["rows"] == 30


def test_heat_maps_of_nobody_go(stores, tmp_path):
    (tmp_path / "heatmaps" / "1.9").mkdir()

    assert differences("--repair") == [("heatmaps_unknown", "1.9", True)]
    assert differences() == []


def test_every_page_of_a_large_catalog_is_looked_at(stores, monkeypatch):
    monkeypatch.setattr(consistency, "PAGE", 1)
    shutil.rmtree(bag_path(stores))
    shutil.rmtree(bag_path(stores, EmbeddingKey("1.2.2", ENCODER)))

    found = check(status=LEFT)

    assert (found["series"], found["bags"]) == (4, 3)
    assert [each["where"] for each in found["differences"]] == [f"{ENCODER}/1.2.0", f"{ENCODER}/1.2.2"]


def test_what_is_told_names_no_patient(stores, tmp_path):
    first_file(stores).unlink()
    shutil.rmtree(bag_path(stores))
    age(tmp_path)

    said = CliRunner().invoke(app, ["check"]).output

    assert "2 differences, 2 left" in said
    assert SENT.patient_id not in said
