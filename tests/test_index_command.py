"""`keyslice index`: what it tells of a sound, a harmed and a missing index, and that a rebuild mends it."""

import json
import shutil

import pytest
from searching import ENCODER, Made, embed_made, random_bag, three_indexed
from typer.testing import CliRunner

from service import indexing
from service.cli import app
from service.indexing import LEASE
from service.settings import Settings

DIFFERENT = 3
KINDS = ("missing", "extra", "duplicate", "differing", "broken")


@pytest.fixture
def stores(tmp_path, monkeypatch):
    """Three series of ten rows, indexed."""
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path))
    opened = three_indexed(Settings())
    yield opened
    opened.close()


def keyslice(*arguments, status=0):
    result = CliRunner().invoke(app, ["index", *arguments])
    assert result.exit_code == status, result.output
    return result.output


def checked(status):
    return json.loads(keyslice("check", "--json", status=status))[ENCODER]


def table(stores):
    return stores.indexes.get(ENCODER).table_name


def test_stats_tell_rows_disk_and_what_waits(stores):
    embed_made(stores, Made("1.2.9", random_bag(9)))

    (told,) = json.loads(keyslice("stats", "--json"))

    assert {name: told[name] for name in ("encoder_id", "table", "series", "rows", "waiting", "broken", "recall")} == {
        "encoder_id": ENCODER,
        "table": table(stores),
        "series": 3,
        "rows": 30,
        "waiting": 1,
        "broken": False,
        "recall": None,
    }
    assert told["bytes"] == stores.index.size_bytes(table(stores)) > 30 * 16
    assert "toy" in keyslice("stats")


def test_a_check_names_each_row_that_differs(stores):
    assert checked(0) == {"rows": 30, "waiting": 0} | {kind: [] for kind in KINDS}
    lance = stores.index._open(table(stores))
    lance.delete("row_id = '1.2.0/3/lung'")
    lance.add(lance.search().where("row_id = '1.2.1/0/lung'").limit(None).to_arrow())
    lance.update(where="row_id = '1.2.2/4/abdomen'", values={"z_mm": 99.0})

    found = checked(DIFFERENT)

    assert (found["missing"], found["duplicate"]) == (["1.2.0/3/lung"], ["1.2.1/0/lung"])
    assert (found["differing"], found["extra"]) == (["1.2.2/4/abdomen"], [])
    assert "missing: 1.2.0/3/lung" in keyslice("check", "--encoder", ENCODER, status=DIFFERENT)


@pytest.mark.parametrize("harm", ["deleted", "corrupt"])
def test_a_rebuild_mends_an_index_that_is_gone_or_does_not_read(stores, tmp_path, harm):
    folder, before = tmp_path / "index" / f"{table(stores)}.lance", table(stores)
    if harm == "deleted":
        shutil.rmtree(folder)
    else:
        for path in (folder / "data").iterdir():
            path.write_bytes(path.read_bytes()[:20])
    assert checked(DIFFERENT)["broken"]

    said = keyslice("rebuild", "--encoder", ENCODER)

    assert table(stores) != before
    assert f"30 rows in {table(stores)}" in said
    assert checked(0)["rows"] == 30
    (told,) = json.loads(keyslice("stats", "--json"))
    assert not told["broken"]


def test_a_rebuild_of_many_commits_leaves_few_fragments_that_every_index_knows(stores, monkeypatch):
    monkeypatch.setattr(indexing, "BAGS_PER_COMMIT", 1)  # three fragments

    keyslice("rebuild")

    lance = stores.index._open(table(stores))
    assert lance.stats()["fragment_stats"]["num_fragments"] <= 2  # the one that was indexed alone stays apart
    behind = {index.name: lance.index_stats(index.name).num_unindexed_rows for index in lance.list_indices()}
    assert behind == {"series_uid_idx": 0, "window_idx": 0}


def test_a_rebuild_waits_for_no_other_writer(stores):
    before = table(stores)
    assert stores.leases.take(LEASE, "another", 60.0)

    assert "another writer" in keyslice("rebuild", status=1)

    assert table(stores) == before


@pytest.mark.parametrize("command", ["check", "rebuild"])
def test_an_encoder_of_no_embedding_is_refused_with_those_there_are(stores, command):
    said = CliRunner().invoke(app, ["index", command, "--encoder", "other@0"])
    assert said.exit_code != 0
    assert ENCODER in said.output
