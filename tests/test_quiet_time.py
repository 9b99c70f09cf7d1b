"""A series that comes slice by slice over HTTP: embedded when it is whole, and once more when more of it comes."""

import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from posting import slice_files
from test_dicomweb import problem, related

from models.ct.phantom import Identity
from service.embedded import in_background

QUIET_SECONDS = 6.0


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A service that does not wait a minute."""
    settings = {"KEYSLICE_SERIES_QUIET_SECONDS": str(QUIET_SECONDS), "KEYSLICE_SWEEP_SECONDS": "0.5"}
    with (
        in_background(tmp_path_factory.mktemp("quiet"), **settings) as running,
        httpx.Client(base_url=running.address, timeout=60) as client,
    ):
        yield client


def send(http: httpx.Client, files: list[tuple[str, bytes]]) -> None:
    for _, content in files:
        assert http.post("/dicom-web/studies", **related([content])).status_code == 200


def series_of(http: httpx.Client, identity: Identity) -> dict[str, Any]:
    return http.get(f"/v1/series/{identity.series_uid}").raise_for_status().json()


def embedded(http: httpx.Client, identity: Identity, slices: int) -> dict[str, Any]:
    """The series once its embedding has that many slices."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        series = series_of(http, identity)
        if series["state"] in ("embedded", "indexed") and series["embeddings"][0]["slices"] == slices:
            return series
        time.sleep(0.1)
    raise AssertionError(series)


def test_nothing_is_embedded_before_the_quiet_time_and_the_whole_series_after_it(http):
    identity = Identity("QUIET")
    files = slice_files(identity, count=8)

    send(http, files[:3])
    time.sleep(QUIET_SECONDS / 2)
    send(http, files[3:5])
    sent = time.monotonic()
    while time.monotonic() < sent + QUIET_SECONDS - 1:
        series = series_of(http, identity)
        assert (series["state"], series["embeddings"][0]["slices"]) == ("received", None)
        time.sleep(0.2)
    first = embedded(http, identity, slices=5)
    assert time.monotonic() - sent > QUIET_SECONDS - 0.5

    send(http, files[5:])
    later = embedded(http, identity, slices=8)

    assert len(later["embeddings"]) == len(first["embeddings"]) == 1
    bag = http.get(f"/v1/series/{identity.series_uid}/embeddings").json()
    assert [each["z_mm"] for each in bag["slices"]] == [5.0 * k for k in range(8)]


def test_completed_it_is_embedded_at_once(http):
    identity = Identity("COMPLETED")
    send(http, slice_files(identity, count=3))
    assert series_of(http, identity)["state"] == "received"
    asked = time.monotonic()

    answer = http.post(f"/v1/series/{identity.series_uid}/complete")

    assert answer.status_code == 202
    assert answer.json()["state"] != "received"
    embedded(http, identity, slices=3)
    assert time.monotonic() - asked < QUIET_SECONDS
    again = http.post(f"/v1/series/{identity.series_uid}/complete")
    assert (again.status_code, again.json()["state"] in ("embedded", "indexed")) == (202, True)


def test_a_series_that_is_not_there_is_not_completed(http):
    problem(http.post("/v1/series/1.2.3/complete"), 404)


def test_the_last_expected_slice_completes_it(http):
    identity = Identity("EXPECTED")
    files = slice_files(identity, 4, change=lambda _, each: setattr(each, "NumberOfSeriesRelatedInstances", 4))
    asked = time.monotonic()

    send(http, files)

    embedded(http, identity, slices=4)
    assert time.monotonic() - asked < QUIET_SECONDS
