"""A cohort's sample, and the page that shows it."""

import base64
import io
import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from archived import archived_file
from cohort import COHORT, DIM, WINDOWS, fill
from fastapi.testclient import TestClient
from PIL import Image
from posting import embed, slice_files
from rich.console import Console
from serving import client_over
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service.app import create_app
from service.cli import app
from service.features.cohort_map import make_map, small, without_pictures
from service.report.map_page import map_page, points_of
from service.settings import Settings
from service.storage.stores import open_stores

IDENTITY = Identity("QXZ-MAP")
HOSTILE = "</script><script>alert(1)</script>"
EVERY = [(each.series_uid, k, window) for each in COHORT for k in range(each.slices) for window in WINDOWS]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """A cohort whose bags are known, and whose slices nobody can picture."""
    folder = tmp_path_factory.mktemp("map")
    # Weights of its own: a service that calibrates the shared ones changes the encoder's id.
    settings = Settings(data_dir=folder, weights_dir=folder / "weights", broker_url="redis://127.0.0.1:1/0")
    opened = open_stores(settings)
    fill(opened, settings)
    for each in COHORT:
        for sop_uid in each.receipt["sop_uids"]:
            file = archived_file(opened, each.series_uid, sop_uid)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"no DICOM")
    opened.tags.put("1.2.3.1", ["pilot", HOSTILE])
    with TestClient(create_app(settings)) as client:
        yield client
    opened.close()


def sampled(client, **query):
    answer = client.get("/v1/features/sample", params=query)
    assert answer.status_code == 200, answer.text
    return pa.ipc.open_stream(answer.content).read_all()


def names(table):
    return [*zip(*(table[name].to_pylist() for name in ("series_uid", "slice", "window")), strict=True)]


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (7, 0), (7, 1), (25, 5)])
def test_a_sample_is_drawn_evenly_from_all_instances(client, count, seed):
    table = sampled(client, count=count, seed=seed)

    expected = [EVERY[k] for k in sorted(random.Random(seed).sample(range(len(EVERY)), count))]
    assert names(table) == expected
    bags = {each.series_uid: each.bag for each in COHORT}
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    np.testing.assert_array_equal(vectors, [bags[uid][k, WINDOWS.index(window)] for uid, k, window in expected])


def test_a_cohort_smaller_than_the_sample_is_there_as_a_whole_with_its_tags(client):
    table = sampled(client, body_part="chest", window="lung")

    assert names(table) == [each for each in EVERY if each[0] in ("1.2.3.1", "1.2.3.2") and each[2] == "lung"]
    assert table["tags"].to_pylist() == [sorted([HOSTILE, "pilot"])] * 4 + [[]] * 3
    assert "ADA" not in str(table.to_pydict())
    assert {*sampled(client, body_part="chest", patients="id")["patient"].to_pylist()} == {"ADA"}


@pytest.mark.parametrize(
    ("query", "status"),
    [({"count": 0}, 422), ({"count": 5001}, 422), ({"seed": -1}, 422), ({"kernel": "none"}, 404), ({"colour": 1}, 422)],
)
def test_a_sample_that_cannot_be_drawn_is_refused(client, query, status):
    assert client.get("/v1/features/sample", params=query).status_code == status


def test_a_series_erased_while_it_is_drawn_is_left_out(client, monkeypatch):
    monkeypatch.setattr("service.features.sample.read_bag", lambda member, *_, **__: None)

    assert len(sampled(client)) == 0


class Page(HTMLParser):
    """What a browser would fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.scripts = [], 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]


def test_a_page_needs_nothing_else_and_runs_nothing_of_a_files(client, tmp_path):
    told = make_map(client_over(client), {"count": 2000}, tmp_path / "map.html", Console(quiet=True))

    text = (tmp_path / "map.html").read_text()
    page = Page(text)
    assert (page.addresses, page.scripts) == ([], 2)
    assert re.findall(r"https?://[^\"' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert points_of(text) == json.loads(json.dumps(told))["points"]
    assert any(HOSTILE in point["tags"] for point in told["points"])
    assert [*tmp_path.iterdir()] == [tmp_path / "map.html"]


def test_pictures_that_the_service_has_none_of_are_missing_and_no_error(client, tmp_path):
    told = make_map(client_over(client), {"count": 5}, tmp_path / "map.html", Console(quiet=True))

    assert [point["picture"] for point in told["points"]] == [None] * 5
    assert told["tsne"] is False
    assert all("picture" not in point for point in without_pictures(told)["points"])


def test_pictures_of_an_older_page_are_not_fetched_again(client, tmp_path):
    path, quiet = tmp_path / "map.html", Console(quiet=True)
    told = make_map(client_over(client), {"count": 5}, path, quiet)
    for point in told["points"][1:]:
        point["picture"] = f"data:image/webp;base64,{point['sop_uid']}"
    path.write_text(map_page(told))

    again = make_map(client_over(client), {"count": 5}, path, quiet)

    assert [each["picture"] for each in again["points"]] == [each["picture"] for each in told["points"]]


def test_a_file_that_is_no_map_is_replaced(client, tmp_path):
    path = tmp_path / "map.html"
    path.write_bytes(b"\xff\xfe no map")

    make_map(client_over(client), {"count": 5}, path, Console(quiet=True))

    assert len(points_of(path.read_text())) == 5


def keyslice(*arguments):
    command = [sys.executable, "-m", "service.cli", "features", "map", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def pixels(picture):
    return np.asarray(Image.open(io.BytesIO(picture)).convert("L"), np.float32)


def test_the_command_shows_each_slice_as_the_service_pictures_it(service, http, tmp_path):
    embed(http, slice_files(IDENTITY, size=160))
    path = tmp_path / "map.html"

    answer = keyslice("--out", path, "--series-uid", IDENTITY.series_uid, "--json", "--service", service.address)

    assert answer.returncode == 0, answer.stderr
    told, points = json.loads(answer.stdout), points_of(path.read_text())
    assert (told["instances"], told["series"], len(told["points"])) == (12, 1, 12)
    assert told["points"] == [{name: each[name] for name in each if name != "picture"} for each in points]
    assert IDENTITY.patient_id not in path.read_text() + answer.stderr
    for point in points:
        where = f"/v1/series/{point['series_uid']}/slices/{point['slice']}/image"
        full = Image.open(io.BytesIO(http.get(where, params={"window": point["window"]}).content))
        kept = pixels(base64.b64decode(point["picture"].partition(",")[2]))
        assert kept.shape == (128, 128)
        expected = np.asarray(full.resize((128, 128), Image.Resampling.BOX), np.float32)
        assert np.corrcoef(kept.ravel(), expected.ravel())[0, 1] > 0.9


def test_missing_pictures_are_exit_status_3_and_a_page_all_the_same(client, tmp_path, monkeypatch):
    monkeypatch.setattr("service.commands.features.asked", lambda _, question: question(client_over(client)))

    answer = CliRunner().invoke(app, ["features", "map", "--out", str(tmp_path / "map.html"), "--limit", "4"])

    assert answer.exit_code == 3
    assert "4 of 4 pictures are missing" in answer.stderr
    assert f"4 of {len(EVERY)} instances, {len(COHORT)} series" in answer.stdout
    assert len(points_of((tmp_path / "map.html").read_text())) == 4


def test_a_picture_keeps_its_sides_ratio_and_is_small():
    wide = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (256, 512), np.uint8)).save(wide, "PNG")

    kept = base64.b64decode(small(wide.getvalue()).partition(",")[2])

    assert pixels(kept).shape == (64, 128)
    assert len(kept) < 8192


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--limit", "0"], 2, "--limit"),
        (["--out", "/nowhere/map.html"], 2, "expected a file in a directory that is there"),
        (["--service", "http://127.0.0.1:9"], 1, "no service answers at http://127.0.0.1:9"),
    ],
)
def test_a_command_that_cannot_run_says_why_and_leaves_no_page(arguments, status, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = keyslice(*arguments)

    assert answer.returncode == status
    assert said in answer.stderr.replace("\n", " ")
    assert [*tmp_path.iterdir()] == []
