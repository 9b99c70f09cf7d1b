"""Searches over HTTP: by several slices, by an upload, by series, narrowed by tags; bad ones refused."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from posting import embed, slice_files

from models.ct.phantom import Identity

QUERY = {"window": "lung", "k": 3}


@pytest.fixture(scope="module")
def series(http):
    """Two patients' series of six slices."""
    for number, name in enumerate(("SEARCH-A", "SEARCH-B")):
        embed(http, slice_files(Identity(name), count=6, seed=number))
    return [Identity(name).series_uid for name in ("SEARCH-A", "SEARCH-B")]


def search(http, path="", **query):
    answer = http.post(f"/v1/search{path}", json=query)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(http, status, kind, path="", **query):
    answer = http.post(f"/v1/search{path}", json=query)
    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:keyslice:{kind}"), answer.text
    return answer.json()["detail"]


def bag(http, uid):
    path = f"/v1/series/{uid}/embeddings"
    found = np.load(io.BytesIO(http.get(path, headers={"Accept": "application/x-npy"}).content)).astype(np.float64)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


def test_several_slices_at_once(http, series):
    first, second = series
    slices = [{"series_uid": first, "slice": k, "window": "lung"} for k in (1, 4)]

    best = search(http, slices=slices, k=6, filters={"series_uid": second})["hits"]
    mean = search(http, slices=slices, k=6, filters={"series_uid": second}, combine="mean")["hits"]

    cosines = bag(http, first)[[1, 4], 1] @ bag(http, second)[:, 1].T
    np.testing.assert_allclose([hit["score"] for hit in best], np.sort(cosines.max(axis=0))[::-1], atol=1e-3)
    np.testing.assert_allclose([hit["score"] for hit in mean], np.sort(cosines.mean(axis=0))[::-1], atol=1e-3)


def test_windows_any_and_fused(http, series):
    first, second = series
    query = {"series_uid": first, "slice": 2, "filters": {"series_uid": second}}

    anywhere = search(http, **query, window="lung", match="any", k=12)["hits"]
    fused = search(http, **query, match="fused", k=6)["hits"]

    mine, theirs = bag(http, first), bag(http, second)
    np.testing.assert_allclose(
        [hit["score"] for hit in anywhere], np.sort((theirs @ mine[2, 1]).reshape(-1))[::-1], atol=1e-3
    )
    expected = np.einsum("wd,swd->sw", mine[2], theirs).mean(axis=1)
    np.testing.assert_allclose([hit["score"] for hit in fused], np.sort(expected)[::-1], atol=1e-3)
    assert {hit["window"] for hit in fused} == {"fused"}


def test_one_hit_per_series(http, series):
    hits = search(http, series_uid=series[0], slice=2, **QUERY, collapse="series", filters={"series_uid": series})
    assert [hit["series_uid"] for hit in hits["hits"]] == series
    assert hits["hits"][0]["slice"] == 2


def test_tags_narrow_at_once(http, series):
    query = {"series_uid": series[0], "slice": 0, **QUERY, "collapse": "series", "filters": {"tags": ["cohort 1"]}}
    before = search(http, **query)["hits"]
    put = http.put(f"/v1/series/{series[1]}/tags", json={"tags": ["cohort 1", " seen "]})

    assert before == []
    assert put.json() == http.get(f"/v1/series/{series[1]}/tags").json() == {"tags": ["cohort 1", "seen"]}
    assert [hit["series_uid"] for hit in search(http, **query)["hits"]] == [series[1]]
    http.put(f"/v1/series/{series[1]}/tags", json={"tags": []})
    assert search(http, **query)["hits"] == []
    assert http.put("/v1/series/9.9/tags", json={"tags": ["x"]}).status_code == 404
    assert http.get("/v1/series/9.9/tags").status_code == 404


def known(http):
    return [each["series_uid"] for each in http.get("/v1/series?limit=1000").json()["series"]]


def upload(http, content, **query):
    return http.post("/v1/search/image", files={"file": content}, data={"query": json.dumps(query)})


def test_an_uploaded_slice_is_embedded_as_a_stored_one_and_not_kept(http, service, series):
    _, content = slice_files(Identity("SEARCH-A"), count=6, seed=0)[3]
    before = known(http)
    here = {"filters": {"series_uid": series}}  # phantoms of other tests may hold the same slice

    answers = [upload(http, content, **query, **here).json() for query in (QUERY, {"match": "fused"}, {"match": "any"})]

    for answer in answers:
        hit = answer["hits"][0]
        assert (hit["series_uid"], hit["slice"]) == (series[0], 3)
        assert hit["score"] > 0.9999
    assert known(http) == before


def test_a_png_of_a_slice_at_a_window_finds_that_slice(http, series):
    picture = http.get(f"/v1/series/{series[1]}/slices/4/image?window=lung").content

    hit = upload(http, picture, **QUERY, filters={"series_uid": series}).json()["hits"][0]

    assert (hit["series_uid"], hit["slice"], hit["window"]) == (series[1], 4, "lung")
    assert hit["score"] > 0.99


def test_uploads_that_cannot_be_searched_by_are_refused_with_the_reason(http, series):
    _, content = slice_files(Identity("SEARCH-A"), count=6, seed=0)[3]
    png = io.BytesIO()
    Image.new("L", (64, 64), 90).save(png, "PNG")
    cases = [
        upload(http, b"no picture", **QUERY),
        upload(http, png.getvalue()[:80], **QUERY),
        upload(http, png.getvalue(), match="fused"),
        upload(http, content, k=3),
        upload(http, content, window="lung", k=0),
        upload(http, content, window="lung", nonsense=1),
        http.post("/v1/search/image", files={"file": content}, data={"query": "{"}),
        http.post("/v1/search/image", data={"query": "{}"}),
    ]
    for answer in cases:
        assert answer.status_code == 422, answer.text
        assert answer.json()["detail"]


def test_bad_searches_are_refused_with_the_reason(http, series):
    one = {"series_uid": series[0], "slice": 0, "window": "lung"}
    zeros = [0.0] * 1280
    refused(http, 422, "bad-query", vector=zeros, encoder="efficientnet_lite0")
    refused(http, 422, "bad-query", vector=[1.0] * 3, encoder="efficientnet_lite0")
    assert "1000" in refused(http, 422, "bad-query", **one, **{"k": 1001})
    assert "0 to 5" in refused(http, 404, "slice-not-found", **{**one, "slice": 6})
    assert "colour" in refused(http, 422, "invalid-request", **one, filters={"colour": "red"})
    refused(http, 422, "invalid-request", **one, filters={"date_from": "yesterday"})
    refused(http, 422, "invalid-request", **one, slices=[one])
    refused(http, 422, "invalid-request", series_uid=series[0], slice=0)
    refused(http, 422, "invalid-request", slices=[])
    refused(http, 422, "invalid-request", "/series", series_uid=series[0], by="attention")
    refused(http, 404, "series-not-found", "/series", series_uid="9.9")
    text = '{"encoder": "efficientnet_lite0", "vector": [NaN, 1.0]}'
    assert http.post("/v1/search", content=text, headers={"Content-Type": "application/json"}).status_code == 422


@pytest.mark.parametrize("by", ["mean", "late"])
def test_similar_series(http, series, by):
    found = search(http, "/series", series_uid=series[0], by=by, k=1000)
    assert series[1] in {hit["series_uid"] for hit in found["hits"]}
    assert series[0] not in {hit["series_uid"] for hit in found["hits"]}
    scores = [hit["score"] for hit in found["hits"]]
    assert scores == sorted(scores, reverse=True)
    only = search(http, "/series", series_uid=series[0], by=by, filters={"patient_id": "SEARCH-B"})
    assert [(hit["series_uid"], hit["slices"]) for hit in only["hits"]] == [(series[1], 6)]
