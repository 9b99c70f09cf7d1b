"""What the search bench measures by: copies of real bags, the nearest of all rows, and what other libraries find."""

from itertools import islice

import numpy as np
import pytest

from bench.copies import copies, draw, hard_set, store
from bench.neighbours import K, Kind, all_rows, by_numpy, in_turns, recall, rivals, tenths
from service.indexing import rebuild_index
from service.settings import Settings
from service.storage.stores import Stores, open_stores

ENCODER, WINDOWS, DIM = "toy@0123456789ab", ["abdomen", "lung"], 64
REAL = [np.random.default_rng(seed).normal(size=(40, 2, DIM)).astype(np.float32) for seed in range(2)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Stores:
    """With an index of copies."""
    folder = tmp_path_factory.mktemp("copies")
    settings = Settings(data_dir=folder)
    opened = open_stores(settings)
    store(copies(REAL, 0, 0), 1000, ENCODER, WINDOWS, folder, opened)
    assert rebuild_index(ENCODER, opened, settings, "test")
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def table(stores) -> str:
    return stores.indexes.started(ENCODER).table_name


@pytest.fixture(scope="module")
def queries() -> tuple[np.ndarray, list[str]]:
    drawn = draw(copies(REAL, 500, 1), 6)
    return np.stack([vector for _, vector in drawn]), [WINDOWS[at] for at, _ in drawn]


def test_copies_are_whole_series_like_the_real_ones_and_none_of_them_twice():
    made = list(islice(copies(REAL, 0, 0), 4))

    lengths = [np.linalg.norm(each.bag.astype(np.float32), axis=2).mean() for each in made]
    assert np.linalg.norm(REAL[0], axis=2).mean() == pytest.approx(np.mean(lengths), rel=0.3)
    assert len({each.identity.series_uid for each in made}) == 4
    assert made[0].identity.patient_id == made[1].identity.patient_id
    assert not np.array_equal(made[0].bag[:20], made[1].bag[:20])
    assert np.array_equal(made[2].bag, next(islice(copies(REAL, 0, 0), 2, None)).bag)


def test_the_hard_set_has_no_more_dimensions_than_it_says():
    bag = next(hard_set(DIM, 2, 0)).bag.astype(np.float32).reshape(-1, DIM)

    assert np.sum(np.linalg.svd(bag, compute_uv=False) > 1) == 48


def test_the_tenth_nearest_is_that_of_all_rows_that_may_answer(stores, table, queries):
    vectors, windows = queries
    some = frozenset(sorted(stores.indexes.embedded(ENCODER))[:5])
    kinds = {"own": Kind(), "any": Kind(own_window=False), "some": Kind(series=some)}

    found = tenths(stores.index, table, vectors, windows, kinds)

    rows = stores.index.rows(table)
    every = all_rows(stores.index, table)
    scores = vectors @ every.T
    own = np.array(rows["window"].to_pylist()) == np.array(windows)[:, None]
    inside = np.array([uid in some for uid in rows["series_uid"].to_pylist()])
    for name, may in {"own": own, "any": np.ones_like(own), "some": own & inside}.items():
        expected = np.sort(np.where(may, scores, -np.inf), axis=1)[:, -K]
        assert np.allclose(found[name], expected, atol=1e-6), name


def test_recall_counts_hits_as_near_as_the_tenth():
    assert (
        recall([[0.9] * K, [0.9] * 5 + [0.1] * 5, [0.9] * 5], np.array([0.9, 0.5, 0.5], np.float32))
        == (1 + 0.5 + 0.5) / 3
    )


def test_others_are_brought_to_the_recall_that_is_asked_for(stores, table, queries):
    rows, vectors = all_rows(stores.index, table), queries[0]
    tenth = tenths(stores.index, table, *queries, {"any": Kind(own_window=False)})["any"]

    others = dict(rivals(rows, vectors, tenth, 0.9, hnsw=True))
    seconds, found = in_turns({**others, "numpy": by_numpy(rows, vectors)}, len(vectors))

    assert [name.split(",")[0] for name in others] == ["faiss IVF_FLAT", "faiss HNSW"]
    assert all(len(times) == len(vectors) and min(times) > 0 for times in seconds.values())
    assert recall(found["numpy"], tenth) == 1
    assert all(recall(hits, tenth) >= 0.9 for hits in found.values())
