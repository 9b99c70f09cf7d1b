"""Filtered searches by the ANN index: k rows where there are k, whatever partitions hold them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lancedb.index import IvfRq
from searching import DIM, ENCODER, Made, embed_made

from service.indexing import keep_index
from service.rows import IndexRows
from service.settings import Settings
from service.similar import Asked, QuerySlice, search
from service.storage.index import Effort, one_of
from service.storage.selection import Narrowed
from service.storage.stores import open_stores

COUNT, SLICES = 10, 60
UIDS = [f"1.2.{number}" for number in range(COUNT)]
LEAST = Effort(nprobes=1, refine=1)


def bag(number: int) -> np.ndarray:
    """Slices about one direction, so that few partitions hold the series."""
    draw = np.random.default_rng(number)
    return (3 * draw.normal(size=DIM) + draw.normal(size=(SLICES, 2, DIM))).astype(np.float16)


BAGS = {uid: bag(number) for number, uid in enumerate(UIDS)}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    settings = Settings(data_dir=tmp_path_factory.mktemp("filtered"), index_ann_rows=COUNT * SLICES)
    opened = open_stores(settings)
    for uid, each in BAGS.items():
        embed_made(opened, Made(uid, each))
    keep_index(opened, settings, "worker")
    # As many partitions as a large table has for its rows.
    lance = opened.index._open(opened.indexes.get(ENCODER).table_name)
    lance.create_index("vector", config=IvfRq(distance_type="cosine", num_partitions=16))
    yield opened
    opened.close()


def nobody() -> None:
    """Who would be asked to mend the index."""


def unit(vectors):
    single = vectors.astype(np.float64)
    return single / np.linalg.norm(single, axis=-1, keepdims=True)


def cosines(query, permitted):
    """Of every permitted slice at the lung window."""
    return {(uid, k): score for uid in permitted for k, score in enumerate(unit(BAGS[uid][:, 1]) @ query)}


@hypothesis_settings(max_examples=50, deadline=None)
@given(
    named=st.frozensets(st.sampled_from(UIDS), min_size=1, max_size=COUNT - 1),
    only=st.booleans(),
    of=st.tuples(st.sampled_from(UIDS), st.integers(0, SLICES - 1)),
    k=st.sampled_from([1, 10, 100, 2 * COUNT * SLICES]),
)
def test_a_filtered_search_finds_k_rows_and_all_where_all_are_asked_for(stores, named, only, of, k):
    narrowed = Narrowed(only=named) if only else Narrowed(without=named)
    query = unit(BAGS[of[0]][of[1], 1])
    true = cosines(query, [uid for uid in UIDS if narrowed.permits(uid)])

    rows = IndexRows(stores.index, stores.indexes.get(ENCODER).table_name, narrowed, LEAST)
    hits = rows.nearest(query.astype(np.float32), k, "lung", frozenset())

    found = {(hit["series_uid"], hit["slice"]): hit["score"] for hit in hits}
    assert len(found) == len(hits) == min(k, len(true))
    np.testing.assert_allclose([true[name] for name in found], list(found.values()), atol=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_one_partition_alone_would_have_found_fewer(stores):
    """What the test above is about does happen here."""
    query = unit(BAGS[UIDS[0]][0, 1]).astype(np.float32)
    lance = stores.index._open(stores.indexes.get(ENCODER).table_name)
    plain = lance.search(query, vector_column_name="vector").distance_type("cosine").nprobes(1).limit(10)
    assert len(plain.where(one_of("series_uid", UIDS[1:2]), prefilter=True).to_arrow()) < 10


def test_a_few_rows_are_read_one_by_one_and_of_many_it_says_what_was_measured(stores):
    query = unit(BAGS[UIDS[0]][5, 1])
    asked = Asked([QuerySlice({"lung": query.astype(np.float32)}, "lung")], 10)

    few, exactly = search(asked, ENCODER, Narrowed(frozenset(UIDS[3:5]), rows=4 * SLICES), 0.0, stores, nobody)
    _, nearly = search(asked, ENCODER, Narrowed(without=frozenset(UIDS[:1])), 0.0, stores, nobody)
    _, plainly = search(asked, ENCODER, Narrowed(), 0.0, stores, nobody)

    true = sorted(cosines(query, UIDS[3:5]).values(), reverse=True)[:10]
    np.testing.assert_allclose([hit["score"] for hit in few], true, atol=1e-4)
    assert (exactly.index, exactly.recall) == ("exact", 1.0)
    assert nearly.index == plainly.index == "IVF_RQ"
    assert "measured without filters" in nearly.note
    assert "filters" not in (plainly.note or "")
