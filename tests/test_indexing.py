"""The index's life: one writer, row for row what the bags are, whoever dies."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from searching import ENCODER, Made, embed_made, random_bag

from service.checking import check_index
from service.indexing import LEASE, index_bags, keep_index, rebuild_index
from service.settings import Settings
from service.similar import Asked, QuerySlice, search
from service.storage.index import SliceIndex
from service.storage.leases import LeaseLost
from service.storage.selection import Narrowed
from service.storage.stores import open_stores

ALL = Narrowed()


def nobody() -> None:
    """Who would be asked to mend the index."""


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", index_ann_rows=600)


@pytest.fixture
def opened(settings):
    stores = open_stores(settings)
    yield stores
    stores.close()


def table(stores) -> str:
    return stores.indexes.get(ENCODER).table_name


def sound(stores) -> bool:
    return not any(check_index(ENCODER, stores).differences.values())


def answer(stores, vector, k=3, **asked):
    query = Asked([QuerySlice({"lung": vector / np.linalg.norm(vector)}, "lung")], k, **asked)
    return search(query, ENCODER, ALL, 0.95, stores, nobody)


def test_bags_that_wait_go_in_by_one_commit(opened, settings):
    for k in range(5):
        embed_made(opened, Made(f"1.2.{k}", random_bag(k)))

    index_bags(opened, settings, "worker")

    assert opened.indexes.not_indexed(10) == []
    assert {opened.catalog.series(f"1.2.{k}").state for k in range(5)} == {"indexed"}
    assert len(opened.index.rows(table(opened))) == 50
    assert sound(opened)


def test_a_lease_outlives_its_time_while_its_holder_works(stores):
    with stores.leases.hold(LEASE, "one", seconds=0.4) as held:
        time.sleep(1.2)
        assert not stores.leases.take(LEASE, "two", 1.0)
        held.check()
    assert stores.leases.take(LEASE, "two", 1.0)


def test_a_writer_that_lost_its_lease_does_not_commit(opened, settings, monkeypatch):
    embed_made(opened, Made("1.2.0", random_bag(0)))
    index_bags(opened, settings, "worker")
    embed_made(opened, Made("1.2.1", random_bag(1)))
    read = opened.bags.receipt

    def stolen(*arguments):  # between the lease and the commit
        opened.leases.release(LEASE, holder(opened))
        opened.leases.take(LEASE, "thief", 60.0)
        return read(*arguments)

    with monkeypatch.context() as patch, pytest.raises(LeaseLost):
        patch.setattr(opened.bags, "receipt", stolen)
        index_bags(opened, settings, "worker")

    assert len(opened.index.rows(table(opened))) == 10
    opened.leases.release(LEASE, "thief")


def holder(stores) -> str:
    from service.storage.tables import LeaseRow

    with stores.database.read() as session:
        row = session.get(LeaseRow, LEASE)
        return row.holder if row else ""


def test_rows_that_two_writers_wrote_are_mended(opened, settings):
    bags = [Made(f"1.2.{k}", random_bag(k)) for k in range(4)]
    for made in bags:
        embed_made(opened, made)
    index_bags(opened, settings, "worker")
    name = table(opened)
    lance = opened.index._open(name)
    lance.add(lance.search().where("series_uid = '1.2.1'").limit(None).to_arrow())  # twice
    lance.delete("series_uid = '1.2.2' AND slice > 2")  # too few
    assert {kind for kind, rows in check_index(ENCODER, opened).differences.items() if rows} == {"duplicate", "missing"}

    keep_index(opened, settings, "worker")

    assert sound(opened)
    assert table(opened) == name


def test_an_ann_index_is_built_measured_and_built_again_when_it_has_grown(opened, settings):
    for k in range(4):
        embed_made(opened, Made(f"1.2.{k}", random_bag(k, slices=80)))
    keep_index(opened, settings, "worker")
    first = opened.indexes.get(ENCODER)
    for k in range(4, 5):
        embed_made(opened, Made(f"1.2.{k}", random_bag(k, slices=80)))
    keep_index(opened, settings, "worker")
    same = opened.indexes.get(ENCODER)
    new = random_bag(5, slices=80)
    vector = new[7, 1].astype(np.float32)
    embed_made(opened, Made("1.2.5", new))
    index_bags(opened, settings, "worker")
    hits, way = answer(opened, vector)
    keep_index(opened, settings, "worker")
    again = opened.indexes.get(ENCODER)

    assert (first.built_rows, same.built_rows, again.built_rows) == (640, 640, 960)
    assert first.recall >= 0.95 and first.measured["queries"] > 30
    # A row that is not in the ANN index yet is found beside it.
    assert (hits[0]["series_uid"], hits[0]["slice"], way.index) == ("1.2.5", 7, "IVF_RQ")
    assert way.recall == same.recall
    assert answer(opened, vector, exact=True)[1].index == "exact"
    assert sound(opened)


def test_a_bag_replaced_after_the_build_is_found_as_it_is_now(opened, settings):
    for k in range(4):
        embed_made(opened, Made(f"1.2.{k}", random_bag(k, slices=80)))
    keep_index(opened, settings, "worker")
    old, new = random_bag(2, slices=80), random_bag(99, slices=81)
    embed_made(opened, Made("1.2.2", new))
    index_bags(opened, settings, "worker")

    (hit,), way = answer(opened, new[80, 1].astype(np.float32), k=1)
    (other,), _ = answer(opened, old[5, 1].astype(np.float32), k=1)

    assert way.index == "IVF_RQ"
    assert (hit["series_uid"], hit["slice"]) == ("1.2.2", 80) and hit["score"] > 0.999
    assert other["score"] < 0.999
    assert sound(opened)


def test_where_the_ann_index_finds_too_little_search_is_exact_and_says_so(opened, settings):
    for k in range(4):
        embed_made(opened, Made(f"1.2.{k}", random_bag(k, slices=80)))
    keep_index(opened, settings, "worker")
    measured = opened.indexes.get(ENCODER)
    vector = random_bag(1, slices=80)[3, 1].astype(np.float32)

    _, way = search(
        Asked([QuerySlice({"lung": vector / np.linalg.norm(vector)}, "lung")], 3), ENCODER, ALL, 1.01, opened, nobody
    )

    assert (way.index, way.recall) == ("exact", 1.0)
    assert f"{measured.recall:.3f}" in way.note


@pytest.mark.parametrize("harm", ["delete table", "truncate data", "delete data", "truncate index", "delete versions"])
def test_an_index_that_does_not_read_is_made_anew_and_search_is_exact_meanwhile(opened, settings, harm):
    bags = [random_bag(k, slices=80) for k in range(4)]
    for k, bag in enumerate(bags):
        embed_made(opened, Made(f"1.2.{k}", bag))
    keep_index(opened, settings, "worker")
    vector, before = bags[2][9, 1].astype(np.float32), table(opened)
    expected, _ = answer(opened, vector, exact=True)
    folder = settings.data_dir / "index" / f"{before}.lance"
    if harm == "delete table":
        shutil.rmtree(folder)
    else:
        verb, what = harm.split()
        for path in (folder / {"data": "data", "index": "_indices", "versions": "_versions"}[what]).rglob("*"):
            if path.is_file():
                path.unlink() if verb == "delete" else os.truncate(path, path.stat().st_size // 2)
    fresh = open_stores(settings)  # a process that has nothing in its caches

    hits, way = answer(fresh, vector)
    keep_index(fresh, settings, "worker")
    _, mended = answer(fresh, vector)

    for found in (hits, answer(fresh, vector, exact=True)[0]):
        assert [(hit["series_uid"], hit["slice"]) for hit in found] == [
            (hit["series_uid"], hit["slice"]) for hit in expected
        ]
    assert way.index == "bags" and "every bag was read" in way.note
    assert mended.index == "IVF_RQ"
    assert table(fresh) != before
    assert sound(fresh)
    fresh.close()


def test_a_rebuild_changes_no_answer(opened, settings):
    for k in range(3):
        embed_made(opened, Made(f"1.2.{k}", random_bag(k)))
    index_bags(opened, settings, "worker")
    before = table(opened)

    assert rebuild_index(ENCODER, opened, settings, "worker")

    assert table(opened) != before
    assert sound(opened)
    assert opened.catalog.series("1.2.0").state == "indexed"


def test_a_table_that_nobody_uses_is_dropped(opened, settings):
    embed_made(opened, Made("1.2.0", random_bag(0)))
    index_bags(opened, settings, "worker")
    stale, young = (SliceIndex.new_name(ENCODER) for _ in range(2))
    for name in (stale, young):
        shutil.copytree(
            settings.data_dir / "index" / f"{table(opened)}.lance", settings.data_dir / "index" / f"{name}.lance"
        )
    for path in (settings.data_dir / "index" / f"{stale}.lance").iterdir():
        os.utime(path, (1, 1))

    keep_index(opened, settings, "worker")

    assert opened.index.names() == sorted([young, table(opened)])


WRITER = """
import json, os, sys, time
from service import indexing
from service.settings import Settings
from service.storage.stores import open_stores

indexing.LEASE_SECONDS = 1.0
settings = Settings(data_dir=sys.argv[1], index_ann_rows=400)
stores = open_stores(settings)
while True:  # the same task, delivered again and again
    for task in (indexing.index_bags, indexing.keep_index):
        try:
            task(stores, settings, f"writer {os.getpid()}")
        except Exception as error:
            print(type(error).__name__, error, flush=True)
    time.sleep(0.01)
"""


def test_four_writers_killed_at_any_moment_leave_no_row_twice_and_none_out(opened, settings):
    draw = random.Random(7)
    start = lambda: subprocess.Popen([sys.executable, "-c", WRITER, str(settings.data_dir)])  # noqa: E731
    writers = [start() for _ in range(4)]
    try:
        for round_ in range(12):
            for k in range(4):
                number = draw.randrange(24)  # some come again with more slices
                embed_made(opened, Made(f"1.2.{number}", random_bag(round_ * 10 + k, slices=3 + round_)))
            time.sleep(draw.uniform(0.3, 1.5))
            victim = draw.randrange(4)
            writers[victim].kill()
            writers[victim].wait()
            writers[victim] = start()
        end = time.monotonic() + 90
        while opened.indexes.not_indexed(1) and time.monotonic() < end:
            time.sleep(0.2)
    finally:
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()

    assert opened.indexes.not_indexed(1) == []
    found = check_index(ENCODER, opened)
    assert json.dumps(found.differences) == json.dumps({kind: [] for kind in found.differences})
    assert found.rows == sum(opened.indexes.expected(ENCODER).values()) > 100
