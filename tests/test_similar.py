"""Searches against brute force over the rows that may answer, however they are narrowed, matched and combined."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from searching import ENCODER, WINDOWS, Made, embed_made, random_bag

from service.errors import BadQuery, NotIndexedYet
from service.indexing import index_bags, keep_index
from service.settings import Settings
from service.similar import Asked, QuerySlice, search
from service.similar_series import attended_vector, late_interaction, similar_series
from service.storage.selection import Narrowed, Wanted
from service.storage.stores import open_stores

MODALITIES, KERNELS, BODIES = ("CT", "MR"), ("B30f", "LUNG", ""), ("CHEST", "ABDOMEN")
MAKERS, TAGS = ("GE MEDICAL SYSTEMS", "Philips's"), ("cohort a", "checked", "100%")
VERDICTS, DATES = ("accepted", "accepted_with_warnings"), ("20010101", "20100615", "20240229", "")


def made(number: int) -> Made:
    """One of 24 series of six patients."""
    draw = np.random.default_rng(number)
    about = {
        "header": {"number": number},
        "modality": MODALITIES[number % 2],
        "kernel": KERNELS[number % 3],
        "body_part": BODIES[number // 2 % 2],
        "manufacturer": MAKERS[number // 3 % 2],
        "study_date": DATES[number % 4],
    }
    tags = [tag for tag in TAGS if draw.random() < 0.4]
    patient, study = f"P{number % 6}", f"1.{number % 12}"
    spacing = [1.0, 2.5, 5.0][number % 3]
    return Made(f"1.2.{number}", random_bag(number, 6), patient, study, about, VERDICTS[number % 5 == 0], spacing, tags)


SERIES = [made(number) for number in range(24)]


@pytest.fixture(scope="module", params=["index", "bags"])
def stores(request, tmp_path_factory):
    settings = Settings(data_dir=tmp_path_factory.mktemp("similar"))
    opened = open_stores(settings)
    for each in SERIES:
        embed_made(opened, each)
    if request.param == "index":
        index_bags(opened, settings, "worker")
    yield opened
    opened.close()


def nobody() -> None:
    """Who would be asked to mend the index."""


def some(values, most=2):
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


FILTERS = st.builds(
    Wanted,
    series_uid=st.one_of(st.just(()), some([each.series_uid for each in SERIES], 20)),
    study_uid=some([f"1.{k}" for k in range(13)], 4),
    patient_id=some(["P0", "P1", "P2", "P3", "nobody", "x' OR '1'='1"], 3),
    modality=some(["CT", "ct", "MR", "PT"]),
    body_part=some(["chest", "ABDOMEN"]),
    manufacturer=some(MAKERS),
    kernel=some(["B30f", "LUNG"]),
    verdict=some(VERDICTS),
    tags=some(TAGS),
    spacing_from_mm=st.sampled_from([None, None, 1.0, 2.0]),
    spacing_to_mm=st.sampled_from([None, None, 2.5, 4.0]),
    date_from=st.sampled_from([None, None, "20100101"]),
    date_to=st.sampled_from([None, None, "20101231"]),
)


def fits(each: Made, wanted: Wanted) -> bool:
    def one(values, mine):
        return not values or mine in values

    upper = lambda values: [value.upper() for value in values]  # noqa: E731
    date = each.about["study_date"]
    return (
        one(wanted.series_uid, each.series_uid)
        and one(wanted.study_uid, each.study)
        and one(wanted.patient_id, each.patient)
        and one(upper(wanted.modality), each.about["modality"])
        and one(upper(wanted.body_part), each.about["body_part"])
        and one(wanted.manufacturer, each.about["manufacturer"])
        and one(wanted.kernel, each.about["kernel"])
        and one(wanted.verdict, each.verdict)
        and all(tag in each.tags for tag in wanted.tags)
        and (wanted.spacing_from_mm is None or each.spacing_mm >= wanted.spacing_from_mm)
        and (wanted.spacing_to_mm is None or each.spacing_mm <= wanted.spacing_to_mm)
        and (wanted.date_from is None or date >= wanted.date_from)
        and (wanted.date_to is None or ("" < date <= wanted.date_to))
    )


def related(each: Made, other: Made, scope: str) -> bool:
    return {
        "none": False,
        "series": each.series_uid == other.series_uid,
        "study": each.study == other.study,
        "patient": each.patient == other.patient,
    }[scope]


def units(bag):
    single = bag.astype(np.float64)
    return single / np.linalg.norm(single, axis=-1, keepdims=True)


def brute_force(places, windows, asked, permitted):
    """Scores of every row that may answer, by name."""
    found = {}
    for each in permitted:
        for number, slice_ in enumerate(units(each.bag)):
            scores = {name: [] for name in ((*WINDOWS, "fused"))}
            for (other, at), window in zip(places, windows, strict=True):
                query = units(SERIES[other].bag)[at]
                own = query[WINDOWS.index(window)]
                for place, name in enumerate(WINDOWS):
                    if asked["match"] == "any" or (asked["match"] == "same" and name == window):
                        scores[name].append(own @ slice_[place])
                if asked["match"] == "fused":
                    scores["fused"].append(np.mean(np.sum(query * slice_, axis=1)))
            for name, values in scores.items():
                if values:
                    combined = max(values) if asked["combine"] == "best" else np.mean(values)
                    found[(each.series_uid, number, name)] = combined
    return found


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    wanted=FILTERS,
    exclude=st.sampled_from(["none", "series", "study", "patient"]),
    places=st.lists(st.tuples(st.integers(0, 23), st.integers(0, 5)), min_size=1, max_size=3),
    windows=st.lists(st.sampled_from(WINDOWS), min_size=3, max_size=3),
    match=st.sampled_from(["same", "any", "fused"]),
    combine=st.sampled_from(["best", "mean"]),
    collapse=st.booleans(),
    k=st.sampled_from([1, 5, 40]),
)
def test_every_answer_is_brute_force_over_what_may_answer(
    stores, wanted, exclude, places, windows, match, combine, collapse, k
):
    windows = windows[: len(places)] if combine == "best" else [windows[0]] * len(places)
    own = [SERIES[number] for number, _ in places]
    permitted = [
        each for each in SERIES if fits(each, wanted) and not any(related(each, other, exclude) for other in own)
    ]
    scores = every = brute_force(places, windows, {"match": match, "combine": combine}, permitted)
    if collapse:
        best = {}
        for name, score in scores.items():
            if score > scores.get(best.get(name[0]), -2):
                best[name[0]] = name
        scores = {name: scores[name] for name in best.values()}
    queries = [
        QuerySlice(dict(zip(WINDOWS, units(SERIES[number].bag)[at].astype(np.float32), strict=True)), window)
        for (number, at), window in zip(places, windows, strict=True)
    ]

    narrowed = stores.selection.narrowed(ENCODER, wanted, exclude, [each.series_uid for each in own])
    hits, _ = search(Asked(queries, k, match, combine, collapse), ENCODER, narrowed, 0.95, stores, nobody)

    names = [(hit["series_uid"], hit["slice"], hit["window"]) for hit in hits]
    assert len(set(names)) == len(names) == min(k, len(scores))
    np.testing.assert_allclose([hit["score"] for hit in hits], sorted(scores.values(), reverse=True)[:k], atol=1e-4)
    # Of slices that tie within a series, either is its best.
    np.testing.assert_allclose([every[name] for name in names], [hit["score"] for hit in hits], atol=1e-4)
    assert not collapse or len({name[0] for name in names}) == len(names)


def test_a_tag_counts_at_once(stores):
    vector = units(SERIES[0].bag)[0, 0].astype(np.float32)
    asked = Asked([QuerySlice({"abdomen": vector}, "abdomen")], 100)

    def tagged():
        narrowed = stores.selection.narrowed(ENCODER, Wanted(tags=("new",)), "none", [])
        return {hit["series_uid"] for hit in search(asked, ENCODER, narrowed, 0.95, stores, nobody)[0]}

    assert tagged() == set()
    stores.tags.put("1.2.7", [*SERIES[7].tags, "new"])
    assert tagged() == {"1.2.7"}
    stores.tags.put("1.2.7", SERIES[7].tags)
    assert tagged() == set()


def test_the_mean_of_slices_at_different_windows_is_refused(stores):
    vector = units(SERIES[0].bag)[0].astype(np.float32)
    queries = [QuerySlice(dict(zip(WINDOWS, vector, strict=True)), window) for window in WINDOWS]
    with pytest.raises(BadQuery, match="different windows"):
        search(Asked(queries, 3, "same", "mean"), ENCODER, Narrowed(), 0.95, stores, nobody)


def test_an_encoder_of_no_embedding_is_told(stores):
    with pytest.raises(NotIndexedYet):
        search(
            Asked([QuerySlice({None: np.ones(8)})], 3, "any"), "other@0123456789ab", Narrowed(), 0.95, stores, nobody
        )


class Head:
    """Attends to the first slice at the lung window only."""

    def predict(self, bag):
        attention = np.zeros(bag.shape[:2], np.float32)
        attention[0, 1] = 1.0
        return np.ones(1), attention


@pytest.mark.parametrize("by", ["mean", "attention", "late"])
def test_similar_series_are_those_of_brute_force(stores, by):
    narrowed = stores.selection.narrowed(ENCODER, Wanted(modality=("CT",)), "patient", ["1.2.4"])
    permitted = [each for each in SERIES if each.about["modality"] == "CT" and each.patient != SERIES[4].patient]
    mine = units(SERIES[4].bag)

    def score(each):
        theirs = units(each.bag)
        if by == "late":
            return np.mean([(mine[:, w] @ theirs[:, w].T).max(axis=1) for w in range(2)])
        if by == "attention":
            return mine[0, 1] @ theirs[0, 1]
        a, b = mine.mean(axis=0).reshape(-1), theirs.mean(axis=0).reshape(-1)
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    expected = sorted(((score(each), each.series_uid) for each in permitted), reverse=True)[:3]
    runner = Head() if by == "attention" else None
    pooling = "head-1" if by == "attention" else "mean"

    for _ in range(2):  # made, then kept
        found = similar_series("1.2.4", 3, ENCODER, pooling, runner, 24 if by == "late" else None, narrowed, stores)
        assert [hit.series_uid for hit in found.hits] == [uid for _, uid in expected]
        np.testing.assert_allclose([hit.score for hit in found.hits], [score for score, _ in expected], atol=2e-3)


def test_a_series_is_most_like_itself_slice_by_slice():
    bag = random_bag(3)
    assert late_interaction(bag, bag) == pytest.approx(1.0, abs=1e-3)
    assert late_interaction(bag, random_bag(4)) < 0.9
    assert np.linalg.norm(attended_vector(bag, Head()).astype(np.float32)) == pytest.approx(1.0, abs=1e-3)


def test_hard_data_is_answered_at_the_recall_that_is_promised(tmp_path):
    """48-dimensional Gaussian latents, which have no clusters: the index is measured, and raised or passed over."""
    settings = Settings(data_dir=tmp_path, index_ann_rows=5000)
    opened = open_stores(settings)
    bags = [random_bag(number, 150, dim=48) for number in range(20)]
    for number, bag in enumerate(bags):
        embed_made(opened, Made(f"1.2.{number}", bag))
    keep_index(opened, settings, "worker")
    every = np.concatenate([units(bag)[:, 1] for bag in bags])
    found = []
    for at in range(0, len(every), 100):
        query = Asked([QuerySlice({"lung": every[at].astype(np.float32)}, "lung")], 10)
        hits, way = search(query, ENCODER, Narrowed(), 0.95, opened, nobody)
        true = set(np.argsort(-(every @ every[at]))[:10])
        found.append(len(true & {int(hit["series_uid"][4:]) * 150 + hit["slice"] for hit in hits}) / 10)

    row = opened.indexes.get(ENCODER)
    assert row.built_rows == 6000
    assert np.mean(found) >= 0.95
    assert way.note is not None or way.recall >= 0.99
    opened.close()
