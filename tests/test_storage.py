"""Bags, archive and index: what is written, what a reader may see."""

import hashlib
import os
import time

import numpy as np
import pytest
import zarr

from models.ct.phantom import Identity
from service.storage.archive import Archive
from service.storage.bags import Bags
from service.storage.folder import Folder
from service.storage.index import IndexBroken, SliceIndex, SliceRows
from service.storage.keys import EmbeddingKey

ENCODER = "toy@0123456789ab"
TABLE = SliceIndex.new_name(ENCODER)
KEY = EmbeddingKey("1.2.3", ENCODER)


@pytest.fixture
def bag() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(5, 2, 8)).astype(np.float16)


def rows(bag: np.ndarray, series_uid: str = "1.2.3", patient: str = "p", study: str = "1.2") -> SliceRows:
    sop_uids, z_mm = [f"{series_uid}.{k}" for k in range(len(bag))], [5.0 * k for k in range(len(bag))]
    return SliceRows(EmbeddingKey(series_uid, ENCODER), patient, study, sop_uids, z_mm, ["abdomen", "lung"], bag)


def test_a_bag_comes_back_with_its_receipt(place, bag):
    bags = Bags(place)

    bags.put(KEY, "c0", bag, {"sop_uids": ["1"]})

    assert np.array_equal(bags.get(KEY, "c0"), bag)
    assert bags.get(KEY, "c0").dtype == np.float16
    assert bags.receipt(KEY, "c0") == {"sop_uids": ["1"]}


def test_a_bag_is_one_chunk_that_numpy_reads_alone(tmp_path, bag):
    Bags(Folder(tmp_path)).put(KEY, "c0", bag, {})
    folder = tmp_path / ENCODER / "1.2.3" / "c0.zarr"

    alone = np.fromfile(folder / "c" / "0" / "0" / "0", dtype="<f2").reshape(5, 2, 8)

    assert np.array_equal(alone, bag)
    assert zarr.open_array(folder, mode="r").metadata.dimension_names == ("slice", "window", "dim")


@pytest.mark.parametrize("empty", [False, True], ids=["numbers", "all zeros, of which Zarr writes no chunk"])
def test_a_slice_is_read_without_the_others(place, bag, empty):
    bags, stored = Bags(place), np.zeros_like(bag) if empty else bag
    bags.put(KEY, "c0", stored, {})

    assert [np.array_equal(bags.get_slice(KEY, "c0", number), stored[number]) for number in range(5)] == 5 * [True]
    for beyond in (-1, 5):
        with pytest.raises(IndexError, match="expected 0 to 4"):
            bags.get_slice(KEY, "c0", beyond)
    with pytest.raises(FileNotFoundError):
        bags.get_slice(KEY, "c1", 0)


def test_a_bag_that_dies_while_it_is_written_is_not_there(tmp_path, bag, monkeypatch):
    bags = Bags(Folder(tmp_path))

    def die(*_arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(OSError, match="no space"):
        bags.put(KEY, "c0", bag, {})
    monkeypatch.undo()

    with pytest.raises(FileNotFoundError):
        bags.get(KEY, "c0")
    bags.put(KEY, "c0", bag, {})
    bags.keep_only(KEY, ["c0"])
    assert [path.name for path in (tmp_path / ENCODER / "1.2.3").iterdir()] == ["c0.zarr"]


def test_the_archive_takes_an_instance_once(tmp_path):
    archive, answers = Archive(Folder(tmp_path / "archive"), tmp_path), []
    for content in (b"first", b"second"):
        (tmp_path / "staged").write_bytes(content)
        answers += archive.add("1.2.3", [("1.2.3.4", tmp_path / "staged")])

    assert answers == [True, False]
    assert archive.sha256("1.2.3", "1.2.3.4") == hashlib.sha256(b"first").digest()
    assert not (tmp_path / "staged").exists()


def test_the_archives_content_changes_with_its_instances(tmp_path):
    archive, seen = Archive(Folder(tmp_path / "archive"), tmp_path), []
    for sop_uid in ("1", "2", "2", "3"):
        (tmp_path / "staged").write_bytes(b"DICM")
        archive.add("1.2.3", [(sop_uid, tmp_path / "staged")])
        seen.append(archive.content("1.2.3"))

    assert [count for _, count in seen] == [1, 2, 2, 3]
    assert len({content for content, _ in seen}) == 3


def test_the_index_equals_the_bags_row_by_row(tables, bag):
    index = SliceIndex(tables)

    index.replace(TABLE, [rows(bag), rows(bag * 2, "1.2.4")])

    table = index.rows(TABLE).to_pylist()
    assert len(table) == len({row["row_id"] for row in table}) == 20
    for row in table:
        expected = (bag if row["series_uid"] == "1.2.3" else bag * 2)[
            row["slice"], ["abdomen", "lung"].index(row["window"])
        ]
        assert np.array_equal(np.array(row["vector"], dtype=np.float16), expected)
        assert row["row_id"] == f"{row['series_uid']}/{row['slice']}/{row['window']}"


def test_a_series_replaced_leaves_no_row_of_before(tables, bag):
    index = SliceIndex(tables)
    index.replace(TABLE, [rows(bag), rows(bag, "1.2.4")])

    for _ in range(2):
        index.replace(TABLE, [rows(bag[:3])])

    table = index.rows(TABLE).to_pylist()
    counts = {uid: sum(row["series_uid"] == uid for row in table) for uid in ("1.2.3", "1.2.4")}
    assert counts == {"1.2.3": 6, "1.2.4": 10}


@pytest.mark.parametrize("where", [None, "window = 'lung'", "series_uid != '1.2.3'", "patient_key = 'q'"])
def test_search_equals_brute_force_over_the_rows_that_count(tables, where):
    random = np.random.default_rng(1)
    index = SliceIndex(tables)
    every = [rows(random.normal(size=(40, 2, 8)).astype(np.float16), f"1.2.{k}", "pq"[k % 2]) for k in range(3, 7)]
    index.replace(TABLE, every)
    query = random.normal(size=8)
    keep = {
        None: lambda row: True,
        "window = 'lung'": lambda row: row["window"] == "lung",
        "series_uid != '1.2.3'": lambda row: row["series_uid"] != "1.2.3",
        "patient_key = 'q'": lambda row: row["patient_key"] == "q",
    }[where]

    hits = index.nearest(TABLE, query, 10, where)

    scores = {}
    for row in filter(keep, index.rows(TABLE).to_pylist()):
        vector = np.array(row["vector"], dtype=np.float64)
        scores[row["row_id"]] = vector @ query / np.linalg.norm(vector) / np.linalg.norm(query)
    expected = sorted(scores, key=scores.__getitem__, reverse=True)[:10]
    assert [f"{hit['series_uid']}/{hit['slice']}/{hit['window']}" for hit in hits] == expected
    assert np.allclose([hit["score"] for hit in hits], [scores[name] for name in expected], atol=1e-3)


def test_a_table_that_is_not_there_is_said_to_be_broken(tables):
    with pytest.raises(IndexBroken):
        SliceIndex(tables).nearest(TABLE, np.ones(8), 10)


def test_compaction_changes_no_row(tables, bag):
    index = SliceIndex(tables)
    for k in range(20):
        index.replace(TABLE, [rows(bag + k, f"1.2.{k}")])
    before = sorted(index.rows(TABLE).to_pylist(), key=lambda row: row["row_id"])

    index.tidy(TABLE)

    assert sorted(index.rows(TABLE).to_pylist(), key=lambda row: row["row_id"]) == before


def test_identities_are_stable():
    assert Identity("A").series_uid == Identity("A").series_uid != Identity("B").series_uid


def test_a_bag_whose_chunk_went_with_it_is_not_read_as_zeros(place, bag):
    Bags(place).put(KEY, "c0", bag, {})
    read = place.read
    place.read = lambda name: (read(name), place.remove(f"{ENCODER}/1.2.3/c0.zarr"))[0]

    with pytest.raises(FileNotFoundError):
        Bags(place).get(KEY, "c0")


def test_a_bag_that_is_there_stays(place, bag):
    bags = Bags(place)
    bags.put(KEY, "c0", bag, {"by": "the first"})

    bags.put(KEY, "c0", bag * 2, {"by": "the second"})

    assert np.array_equal(bags.get(KEY, "c0"), bag)
    assert bags.receipt(KEY, "c0") == {"by": "the first"}


def test_everything_of_bags_is_named_kept_and_removed_by_series(place, bag):
    bags, other = Bags(place), EmbeddingKey("1.2.34", ENCODER)
    started = time.time()
    for key, content in ((KEY, "c0"), (KEY, "c1"), (other, "c0")):
        bags.put(key, content, bag, {})

    assert sorted(bags.everything()) == [(KEY, "c0.zarr"), (KEY, "c1.zarr"), (other, "c0.zarr")]
    assert bags.changed_at(KEY, "c1.zarr") == pytest.approx(started, abs=60)
    assert bags.changed_at(KEY, "c2.zarr") is None
    assert (bags.count("1.2.3"), bags.count("1.2.34"), bags.count("1.2")) == (2, 1, 0)
    bags.keep_only(KEY, {"c1"})
    assert sorted(bags.everything()) == [(KEY, "c1.zarr"), (other, "c0.zarr")]
    bags.remove("1.2.3")
    assert sorted(bags.everything()) == [(other, "c0.zarr")]
    assert [bags.exists(*which) for which in ((KEY, "c1"), (other, "c0"))] == [False, True]


def test_what_a_dead_writer_left_of_a_bag_is_no_bag_and_is_replaced(place, bag):
    bags, chunk = Bags(place), f"{ENCODER}/1.2.3/c0.zarr/c/0/0/0"
    bags.put(KEY, "c0", bag * 2, {})
    place.remove(f"{ENCODER}/1.2.3/c0.zarr/zarr.json")  # as it is before the last of it is written

    assert place.exists(chunk) and not bags.exists(KEY, "c0")
    with pytest.raises(FileNotFoundError):
        bags.get(KEY, "c0")
    bags.put(KEY, "c0", bag, {})

    assert np.array_equal(bags.get(KEY, "c0"), bag)
    assert bags.damage(KEY, "c0") is None
