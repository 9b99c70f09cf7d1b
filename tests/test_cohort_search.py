"""The cohort, by what is known of its series: words, tags, dates, verdicts, states."""

import pytest
from posting import post, slice_files
from starlette.testclient import TestClient

from models.ct.phantom import Identity
from service.app import create_app
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.cohorts import CohortFilter
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

ENCODER = "toy@0"


def said(vr: str, text: str) -> dict:
    return {"vr": vr, "Value": [text]}


@pytest.fixture
def cohort(stores) -> Stores:
    """Three series of two patients."""
    about = [
        {"manufacturer": "GE MEDICAL", "kernel": "LUNG", "study_date": "20230501", "header": {}},
        {"manufacturer": "SIEMENS", "kernel": "B30f", "study_date": "20240102"},
        {"manufacturer": "SIEMENS", "kernel": "100%", "study_date": ""},
    ]
    about[1]["header"] = {"0008103E": said("LO", "Thorax venous"), "00081090": said("LO", "Sensation 64")}
    about[2]["header"] = {"00081030": said("LO", "Abdomen_native")}
    arrivals = [Arrival(f"1.2.{k}", f"1.{k}", f"P{min(k, 1)}", each) for k, each in enumerate(about)]
    stores.catalog.receive(arrivals, ENCODER)
    stores.tags.put("1.2.2", ["Phase II"])
    return stores


def found(cohort: Stores, chosen: CohortFilter = CohortFilter(), **asked) -> list[int]:  # noqa: B008
    return [int(row.series_uid[-1]) for row in cohort.cohorts.series(chosen, limit=10, **asked)]


EXPECTED = {
    "": [0, 1, 2],
    "siemens": [1, 2],
    "SIEMENS b30": [1],
    "sensation thorax": [1],
    "abdomen_native": [2],
    "phase": [2],
    "1.2.0": [0],
    "p1 2024": [1],
    "ge lung b30": [],
    "%": [2],
    "_": [2],
    "'": [],
}


def test_each_word_is_somewhere_in_what_is_known(cohort):
    assert {text: found(cohort, words=text.split()) for text in EXPECTED} == EXPECTED


def test_filters_narrow_each_other(cohort):
    cohort.catalog.fail(EmbeddingKey("1.2.1", ENCODER), "failed", "x", {"status": "rejected"})

    assert found(cohort, CohortFilter(date_from="20240101")) == [1]
    assert found(cohort, CohortFilter(date_to="20231231")) == [0]
    assert found(cohort, CohortFilter(manufacturer="siemens"), tags=["Phase II"]) == [2]
    assert found(cohort, tags=["Phase II", "other"]) == []
    assert found(cohort, CohortFilter(verdict="rejected")) == [1]
    assert found(cohort, state="failed") == [1]
    assert found(cohort, CohortFilter(patient_id=("P1",)), state="received") == [2]
    assert found(cohort, after="1.2.0") == [1, 2]


def test_by_http_page_by_page(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", broker_url="memory://", sweep_seconds=1e6)
    with TestClient(create_app(settings)) as http:
        for number in range(3):
            post(http, slice_files(Identity(f"SEARCH-{number}"), count=1))
        asked = {"text": "search-", "limit": 2}
        first = http.get("/v1/series", params=asked).json()
        rest = http.get("/v1/series", params=asked | {"cursor": first["next_cursor"]}).json()

        assert sorted(each["patient_id"] for page in (first, rest) for each in page["series"]) == [
            f"SEARCH-{number}" for number in range(3)
        ]
        assert rest["next_cursor"] is None
        assert http.get("/v1/series", params={"patient_id": "SEARCH-1"}).json()["series"][0]["patient_id"] == "SEARCH-1"
        for wrong in (
            {"date_from": "yesterday"},
            {"verdict": "good"},
            {"text": "x" * 201},
            {"text": "\0"},
            {"wrong": 1},
        ):
            assert http.get("/v1/series", params=wrong).status_code == 422, wrong
