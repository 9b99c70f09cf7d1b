"""How embeddings change over time: the figures, where they are kept, who tells them."""

import json
import math
import unittest.mock
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import ENCODER, Made, embed_made, random_bag
from serving import settings_of
from sqlalchemy import update
from starlette.testclient import TestClient
from typer.testing import CliRunner

from models.health import LEAST, SLICES, BagHealth, bag_health, drift, effective_rank
from service.app import create_app
from service.checking import index_stats
from service.cli import app
from service.drift import embedding_health
from service.indexing import index_bags, rebuild_index
from service.metrics import health_metrics, vendor
from service.settings import Settings
from service.storage import canaries
from service.storage.catalog import Arrival
from service.storage.health import BagFigures
from service.storage.indexes import Indexed
from service.storage.keys import EmbeddingKey
from service.storage.stores import open_stores
from service.storage.tables import EmbeddingRow, now


def slow_effective_rank(rows: list[list[float]]) -> float:
    """Roy and Vetterli 2007, Definition 1, term by term."""
    values = np.linalg.svd(np.array(rows), compute_uv=False).tolist()
    total, entropy = math.fsum(values), 0.0
    for value in values:
        if value > 0:
            entropy -= value / total * math.log(value / total)
    return math.exp(entropy)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_the_effective_rank_is_that_of_the_paper(count, dim, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, dim))

    found = effective_rank(vectors)

    assert found == pytest.approx(slow_effective_rank(vectors.tolist()), rel=1e-5)
    assert 1 - 1e-9 <= found <= min(count, dim) + 1e-9
    assert found == pytest.approx(effective_rank(1000 * vectors))


def test_the_effective_rank_of_what_is_known_by_hand():
    assert effective_rank(7.0 * np.eye(5, 9)) == pytest.approx(5)
    assert effective_rank(np.ones((4, 3))) == pytest.approx(1)
    assert effective_rank(np.zeros((4, 3))) == 1
    # Shares 3/4 and 1/4: the entropy is 2 ln 2 - 3/4 ln 3.
    assert effective_rank(np.diag([3.0, 1.0, 0.0])) == pytest.approx(4 / 3**0.75)
    assert math.isnan(effective_rank(np.array([[math.nan, 1.0], [0.0, 1.0]])))


def test_a_bags_figures_are_of_all_its_lengths_and_of_some_of_its_slices():
    bag = np.zeros((3, 2, 4), np.float16)
    bag[..., 0] = [[3, 4], [5, 6], [7, 8]]
    spread = math.sqrt(sum((k - 5.5) ** 2 for k in range(3, 9)) / 6)
    thin = np.random.default_rng(0).normal(size=(3 * SLICES, 1, 400))

    assert bag_health(bag) == BagHealth(pytest.approx(5.5), pytest.approx(spread), None)
    picked = [round(k * (3 * SLICES - 1) / (SLICES - 1)) for k in range(SLICES)]
    assert bag_health(thin).effective_rank == pytest.approx(slow_effective_rank(thin[picked, 0].tolist()))
    assert bag_health(np.repeat(thin[:1], SLICES, axis=0)).effective_rank == pytest.approx(1, abs=1e-4)


def test_drift_is_in_standard_deviations_and_told_where_there_are_enough():
    reference = [float(k) for k in range(LEAST)]
    mean = sum(reference) / LEAST
    spread = math.sqrt(sum((k - mean) ** 2 for k in reference) / (LEAST - 1))

    assert drift(mean + 3 * spread, reference) == pytest.approx(3)
    assert drift(mean, reference[1:]) is None
    assert drift(2.0, [1.0] * LEAST) is None


SCANNERS = {"ge": ("GE MEDICAL SYSTEMS", "STANDARD"), "siemens": ("Siemens Healthineers", "Br40")}


def put(stores, number: int, scanner: str, health: BagHealth, days_ago: float = 0.0) -> None:
    """A series as it is once its bag was measured; the figures are all that is of interest here."""
    manufacturer, kernel = SCANNERS[scanner]
    key, about = EmbeddingKey(f"1.2.{number}", ENCODER), {"manufacturer": manufacturer, "kernel": kernel}
    stores.catalog.receive([Arrival(key.series_uid, "1", "P", about)], ENCODER)
    with unittest.mock.patch("service.storage.catalog.now", lambda: now() - timedelta(days=days_ago)):
        stores.catalog.commit(key, "c0", 4, {"status": "accepted"}, {"slices": 4})
    stores.indexes.indexed([Indexed(key, "c0", 8, np.ones(16, np.float16), health)])


@pytest.fixture
def drifted(stores):
    """Twenty bags of long ago, three of today on the same scanner, four of today on another, three times as long."""
    for k in range(LEAST):
        put(stores, k, "ge", BagHealth(10.0 + 0.1 * k, 1.0, 20.0 - 0.1 * k), days_ago=500)
    for k in range(3):
        put(stores, 100 + k, "ge", BagHealth(10.0 + k, 1.0, 19.0))
    for k in range(4):
        put(stores, 200 + k, "siemens", BagHealth(30.0 + k, 2.0, 10.0 if k else None))
    return stores


def test_months_are_told_by_scanner_and_kernel_against_the_first_bags(drifted, monkeypatch):
    monkeypatch.setattr("service.drift.FIRST", LEAST)

    found = embedding_health(ENCODER, drifted)

    spread = math.sqrt(sum((0.1 * k - 0.95) ** 2 for k in range(LEAST)) / (LEAST - 1))
    month = now().strftime("%Y-%m")
    assert found["reference"] == pytest.approx({"bags": LEAST, "norm": 10.95, "effective_rank": 19.05})
    assert [list(each.values()) for each in found["by_scanner"]] == [
        [month, *SCANNERS["siemens"], 4]
        + [pytest.approx(each) for each in (31.5, 2.0, (31.5 - 10.95) / spread, 10.0, (10.0 - 19.05) / spread)],
        [month, *SCANNERS["ge"], 3]
        + [pytest.approx(each) for each in (11.0, 1.0, (11.0 - 10.95) / spread, 19.0, (19.0 - 19.05) / spread)],
    ]


def test_metrics_tell_the_newest_bags_by_vendor(drifted, monkeypatch):
    monkeypatch.setattr("service.metrics.FIRST", LEAST)
    monkeypatch.setattr("service.metrics.NEWEST", 7)
    drifted.canaries.record(ENCODER, np.ones((1, 8), np.float32))
    drifted.canaries.record(ENCODER, np.array([[1, 1, 1, 1, 1, 1, 1, 0]], np.float32))

    samples = [sample for metric in health_metrics([ENCODER], drifted) for sample in metric.samples]

    stats = {each["manufacturer"]: each for each in with_first(drifted, monkeypatch)["by_scanner"]}
    assert {(each.name, *each.labels.values()): each.value for each in samples} == {
        ("keyslice_effective_rank", ENCODER, "ge"): pytest.approx(19.0),
        ("keyslice_effective_rank", ENCODER, "siemens"): pytest.approx(10.0),
        ("keyslice_norm_drift", ENCODER, "ge"): pytest.approx(stats["GE MEDICAL SYSTEMS"]["norm_drift"]),
        ("keyslice_norm_drift", ENCODER, "siemens"): pytest.approx(stats["Siemens Healthineers"]["norm_drift"]),
        ("keyslice_canary_cosine", ENCODER): pytest.approx(math.sqrt(7 / 8)),
    }


def with_first(stores, monkeypatch) -> dict:
    monkeypatch.setattr("service.drift.FIRST", LEAST)
    return embedding_health(ENCODER, stores)


@pytest.mark.parametrize(
    ("manufacturer", "name"),
    [
        ("GE MEDICAL SYSTEMS", "ge"),
        ("TOSHIBA_MEC", "toshiba"),
        ("Siemens Healthineers", "siemens"),
        ("Generic", "other"),
        ("DOE^JANE", "other"),
        ("", "other"),
    ],
)
def test_a_vendor_is_one_of_a_closed_list(manufacturer, name):
    assert vendor(manufacturer) == name


def test_a_bag_is_measured_when_it_is_indexed_and_again_when_the_index_is_rebuilt(stores, tmp_path):
    settings, bag = Settings(data_dir=tmp_path / "data"), random_bag(0, slices=SLICES)
    embed_made(stores, Made("1.2.0", bag))
    index_bags(stores, settings, "worker")
    indexed = stores.health.first(ENCODER, 10)
    with stores.database.write() as session:
        session.execute(update(EmbeddingRow).values(norm=None, norm_spread=None, effective_rank=None))
    before = embedding_health(ENCODER, stores)
    assert rebuild_index(ENCODER, stores, settings, "worker")

    expected = bag_health(bag)
    assert indexed == [BagFigures("", pytest.approx(expected.norm), pytest.approx(expected.effective_rank))]
    assert (before["reference"], before["by_scanner"]) == (None, [])
    assert stores.health.first(ENCODER, 10) == indexed


def test_the_canarys_lowest_cosine_of_each_day_is_kept_for_a_while(stores, monkeypatch):
    day = datetime(2026, 1, 1, 12, tzinfo=UTC)
    one, other = np.array([[1, 0]], np.float32), np.array([[1, 1]], np.float32)
    for number in range(-100, 500, 100):
        monkeypatch.setattr(canaries, "now", lambda number=number: day + timedelta(days=number))
        for embedding in (one, other, one):
            stores.canaries.record(ENCODER, embedding)
    stores.canaries.record("another@0123456789ab", one)

    found = [(each.day, each.lowest, each.checks) for each in stores.canaries.days(ENCODER)]

    kept = [(day + timedelta(days=number)).strftime("%Y-%m-%d") for number in range(0, 500, 100)]
    assert found == [(each, pytest.approx(1 / math.sqrt(2)), 3) for each in kept]


@pytest.mark.parametrize(("mode", "degrees", "status"), [("exact", 0.02, 200), ("exact", 0.4, 503), ("bulk", 0.4, 200)])
def test_a_service_is_ready_while_its_canary_is_within_the_bound_of_its_mode(tmp_path, broker, mode, degrees, status):
    opened = open_stores(Settings(data_dir=tmp_path))
    for angle in (0.0, 20.0):  # of an encoder that is no longer in use
        opened.canaries.record("former@0123456789ab", turned(angle))
    for angle in (0.0, degrees):
        opened.canaries.record(ENCODER, turned(angle))
    opened.close()

    served = create_app(settings_of(tmp_path, broker_url=broker, mode=mode))
    with TestClient(served, client=("127.0.0.1", 1), base_url="http://127.0.0.1:8000") as http:
        ready = http.get("/readyz")

    assert (ready.status_code, ready.json()["canary_cosine"]) == (
        status,
        pytest.approx(math.cos(math.radians(degrees))),
    )


def turned(degrees):
    return np.array([math.cos(math.radians(degrees)), math.sin(math.radians(degrees))], np.float32)


def test_the_command_shows_drift_and_canary(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path))
    settings = Settings(data_dir=tmp_path)
    opened = open_stores(settings)
    for k in range(LEAST):
        put(opened, k, "ge", BagHealth(10.0 + k, 1.0, 19.0))
    opened.canaries.record(ENCODER, np.ones((1, 8), np.float32))

    shown = CliRunner().invoke(app, ["index", "stats"])
    told = CliRunner().invoke(app, ["index", "stats", "--json"])

    assert shown.exit_code == told.exit_code == 0
    assert f"first {LEAST} bags: norm 19.50, rank 19.0" in shown.stdout
    row = next(line.split() for line in shown.stdout.splitlines() if "STANDARD" in line)
    assert row[-6:] == [str(LEAST), "19.50", "1.00", "0.00", "19.0", "-"]
    assert f"canary of {ENCODER}: 1 checks, lowest cosine 1.000000 on {now():%Y-%m-%d}" in shown.stdout
    assert json.loads(told.stdout) == json.loads(json.dumps(index_stats(opened)))
    opened.close()
