"""One real series over HTTP, through a real broker and worker: POST, embedding, head, prediction, search.

On the stores that come with the service, and on PostgreSQL and Redis.
"""

import io
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from PIL import Image
from posting import embed, post, read, slice_files, tarred, wait

from models.ct.decode import read_hu
from models.ct.phantom import Identity
from models.ct.slices import encoder_input
from models.ct.windows import LUNG, apply_window
from models.load import load_encoder
from models.zoo import ENCODERS

SPEC = ENCODERS["efficientnet_lite0"]


@pytest.fixture(scope="module", params=["service", "on_servers"])
def http(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=request.getfixturevalue(request.param).address, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def series_uid(http: httpx.Client, lidc_0001: list[Path]) -> str:
    (series,) = embed(http, [("series.tar", tarred(read(lidc_0001)))])["series"]
    # Another test may have sent it by another door.
    assert (series["received"] + series["duplicates"], series["set_aside"]) == (133, [])
    return series["series_uid"]


def positions(paths: list[Path]) -> list[tuple[float, str]]:
    """(z, SOPInstanceUID) by ImagePositionPatient alone."""
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in paths]
    return sorted((float(header.ImagePositionPatient[2]), str(header.SOPInstanceUID)) for header in headers)


def test_a_real_series_is_accepted_with_its_geometry(http, series_uid):
    series = http.get(f"/v1/series/{series_uid}").json()

    assert series["state"] == "indexed"
    assert series["verdict"] == {"status": "accepted", "findings": [], "set_aside": []}
    assert series["geometry"] == {
        "slices": 133,
        "rows": 512,
        "columns": 512,
        "pixel_spacing_mm": [0.703125, 0.703125],
        "slice_spacing_mm": 2.5,
        "z_mm": [-340.0, -10.0],
        "tilt_degrees": 0.0,
        "kernels": ["STANDARD"],
    }


def test_its_bag_runs_from_feet_to_head(http, series_uid, lidc_0001):
    answer = http.get(f"/v1/series/{series_uid}/embeddings").json()

    assert np.array(answer["embeddings"]).shape == (133, 2, 1280)
    assert answer["windows"] == ["abdomen", "lung"]
    assert [(each["z_mm"], each["sop_uid"]) for each in answer["slices"]] == positions(lidc_0001)
    assert [each["slice"] for each in answer["slices"]] == list(range(133))


def test_npy_is_the_same_bag(http, series_uid):
    path = f"/v1/series/{series_uid}/embeddings"
    listed = http.get(path).json()

    answer = http.get(path, headers={"Accept": "application/x-npy"})

    assert answer.headers["x-keyslice-encoder"] == listed["encoder_id"]
    assert np.array_equal(np.load(io.BytesIO(answer.content)), np.array(listed["embeddings"], dtype=np.float16))


def test_one_window_is_a_part_of_the_bag(http, series_uid):
    path, npy = f"/v1/series/{series_uid}/embeddings", {"Accept": "application/x-npy"}
    both = np.load(io.BytesIO(http.get(path, headers=npy).content))

    lung = np.load(io.BytesIO(http.get(path, params={"window": "lung"}, headers=npy).content))

    assert np.array_equal(lung, both[:, 1:])


def test_a_stored_embedding_is_the_encoders_own(http, series_uid, lidc_0001, tmp_path):
    encoder = load_encoder(SPEC, tmp_path)
    stored = np.load(
        io.BytesIO(http.get(f"/v1/series/{series_uid}/embeddings", headers={"Accept": "application/x-npy"}).content)
    )
    by_uid = {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in lidc_0001}
    middle = by_uid[positions(lidc_0001)[66][1]]

    alone = encoder.encode(encoder_input(read_hu(middle), SPEC.windows, SPEC.input_size)[None])[0]

    for window in (0, 1):
        a, b = stored[66, window].astype(np.float64), alone[window].astype(np.float64)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9999


def test_the_same_series_posted_twice_is_embedded_once(http, series_uid, lidc_0001):
    before = http.get(f"/v1/series/{series_uid}").json()

    (again,) = embed(http, read(lidc_0001)[:20])["series"]

    assert (again["received"], again["duplicates"], again["state"]) == (0, 20, "indexed")
    assert http.get(f"/v1/series/{series_uid}").json() == before


def test_search_equals_brute_force_over_the_bag(http, series_uid):
    npy = http.get(f"/v1/series/{series_uid}/embeddings", headers={"Accept": "application/x-npy"})
    bag = np.load(io.BytesIO(npy.content)).astype(np.float64)
    unit = bag[:, 1] / np.linalg.norm(bag[:, 1], axis=1, keepdims=True)  # the lung window
    cosine = unit @ unit[70]
    query = {"series_uid": series_uid, "slice": 70, "window": "lung", "k": 10}

    answer = http.post("/v1/search", json={**query, "filters": {"series_uid": series_uid}}).json()

    assert [hit["slice"] for hit in answer["hits"]] == list(np.argsort(-cosine)[:10])
    assert np.allclose([hit["score"] for hit in answer["hits"]], np.sort(cosine)[::-1][:10], atol=1e-4)
    assert (answer["index"], answer["recall"]) == ("exact", 1.0)


def test_a_vector_finds_the_slice_it_is_of(http, series_uid):
    bag = http.get(f"/v1/series/{series_uid}/embeddings").json()
    query = {"vector": bag["embeddings"][40][0], "encoder": bag["encoder_id"], "k": 1}

    (hit,) = http.post("/v1/search", json=query).json()["hits"]

    assert (hit["series_uid"], hit["slice"], hit["window"]) == (series_uid, 40, "abdomen")
    assert (hit["sop_uid"], hit["patient_id"]) == (bag["slices"][40]["sop_uid"], "LIDC-IDRI-0001")


def test_a_slice_is_a_picture_of_itself(http, series_uid, lidc_0001):
    by_uid = {str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID): path for path in lidc_0001}
    expected = apply_window(read_hu(by_uid[positions(lidc_0001)[70][1]]), LUNG) * 255

    answer = http.get(f"/v1/series/{series_uid}/slices/70/image", params={"window": "lung"})

    assert answer.headers["content-type"] == "image/png"
    assert np.abs(np.asarray(Image.open(io.BytesIO(answer.content))) - expected).max() <= 0.5001


def test_the_receipt_says_where_the_bag_comes_from(http, series_uid):
    receipt = http.get(f"/v1/series/{series_uid}/embeddings").json()["receipt"]

    assert receipt["rescale"] == [[1.0, -1024.0]]
    assert receipt["decoders"] == ["pydicom"]
    assert receipt["encoder_id"] == f"efficientnet_lite0@{receipt['encoder_fingerprint'][:12]}"
    assert receipt["code_version"] and receipt["started_at"] and receipt["seconds"] > 0


@pytest.mark.parametrize("kind", ["zip", "gz", "xz", "bz2"])
def test_every_archive_kind_is_taken(http, kind, tmp_path):
    files = slice_files(Identity(f"ARCHIVE-{kind}"))
    if kind == "zip":
        path = tmp_path / "series.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files:
                archive.writestr(f"folder/{name}", content)
        body = path.read_bytes()
    else:
        body = tarred(files, f"w:{kind}")

    (series,) = embed(http, [("series", body)])["series"]

    assert series["received"] == 6


def cohort(http: httpx.Client, prefix: str, patients: int) -> list[str]:
    """Small patients of which every second one is brighter; all embedded."""

    def brighter(_number, dataset):
        dataset.RescaleIntercept = -400

    jobs, names = [], []
    for number in range(patients):
        identity = Identity(f"{prefix}-{number}")
        files = slice_files(identity, count=3, seed=number, change=brighter if number % 2 else None)
        jobs.append(post(http, files).json()["job_id"])
        names.append(identity.patient_id)
    for job in jobs:
        assert wait(http, job)["state"] == "done"
    return names


def train(http: httpx.Client, table: str, **options: str) -> httpx.Response:
    return http.post("/v1/heads", files={"labels": ("labels.csv", table.encode())}, data=options)


@pytest.fixture(scope="module")
def head(http: httpx.Client) -> dict:
    names = cohort(http, "HEAD", 12)
    table = "patient_id,bright\n" + "\n".join(f"{name},{k % 2}" for k, name in enumerate(names))
    answer = train(http, table, batch_size="4", learning_rate="1e-3", epochs="40")
    assert answer.status_code == 202, answer.text
    assert wait(http, answer.json()["job_id"])["state"] == "done"
    return http.get(f"/v1/heads/{answer.json()['head_id']}").json()


def test_a_head_learns_what_its_labels_say(http, head):
    (dark, bright) = cohort(http, "UNSEEN", 2)

    predictions = [
        http.get(f"/v1/patients/{name}/predictions", params={"head": head["head_id"]}).json()["probabilities"]["bright"]
        for name in (dark, bright)
    ]

    assert head["report"]["validation"]["bright"]["auroc"]["value"] > 0.9
    assert predictions[0] < 0.5 < predictions[1]


def test_attention_is_over_every_instance_and_sums_to_one(http, head):
    uid = Identity("HEAD-1").series_uid
    bag = http.get(f"/v1/series/{uid}/embeddings").json()

    answer = http.get(f"/v1/series/{uid}/attention", params={"head": head["head_id"]}).json()

    expected = [
        (each["slice"], each["sop_uid"], each["z_mm"], window) for each in bag["slices"] for window in bag["windows"]
    ]
    weights = [each["weight"] for each in answer["instances"]]
    assert [(each["slice"], each["sop_uid"], each["z_mm"], each["window"]) for each in answer["instances"]] == expected
    assert sum(weights) == pytest.approx(1.0, abs=1e-5)
    assert sum(answer["window_share"].values()) == pytest.approx(1.0, abs=1e-5)
    by_slice = [weights[2 * k] + weights[2 * k + 1] for k in range(len(bag["slices"]))]
    assert [each["slice"] for each in answer["top_slices"]] == sorted(range(len(by_slice)), key=lambda k: -by_slice[k])[
        :5
    ]


def test_a_worker_makes_a_heat_map_on_first_asking(http, head):
    path = f"/v1/series/{Identity('HEAD-1').series_uid}/slices/1/heatmap"
    ask = {"head": head["head_id"], "label": "bright", "window": "lung"}

    numbers = http.get(path, params=ask, headers={"Accept": "application/json"})
    picture = http.get(path, params=ask)

    assert numbers.status_code == 200, numbers.text
    assert (numbers.json()["method"], numbers.json()["slice"]) == ("decomposition", 1)
    assert np.abs(numbers.json()["cells"]).max() > 0
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)


def test_a_patients_bag_is_all_their_series_unless_narrowed(http, head):
    embed(http, slice_files(Identity("TWICE", study="1"), count=3, seed=1))
    embed(http, slice_files(Identity("TWICE", study="2"), count=4, seed=2))
    ask = {"head": head["head_id"]}
    second = Identity("TWICE", study="2")

    both = http.get("/v1/patients/TWICE/predictions", params=ask).json()
    narrowed = http.get("/v1/patients/TWICE/predictions", params={**ask, "study_uid": second.study_uid}).json()

    assert both["series"] == sorted([Identity("TWICE", study="1").series_uid, second.series_uid])
    assert narrowed["series"] == [second.series_uid]
    assert narrowed["probabilities"] != both["probabilities"]


@pytest.mark.parametrize("exclude", ["none", "series", "study", "patient"])
def test_search_excludes_what_it_is_told_to(http, exclude):
    for study, series in (("1", "1"), ("1", "2"), ("2", "1")):
        embed(http, slice_files(Identity("EXCLUDE", study, series), count=2, seed=5))
    query = {"series_uid": Identity("EXCLUDE").series_uid, "slice": 0, "window": "lung", "k": 100, "exclude": exclude}

    hits = http.post("/v1/search", json={**query, "filters": {"patient_id": "EXCLUDE"}}).json()["hits"]

    expected = {
        "none": {("1", "1"), ("1", "2"), ("2", "1")},
        "series": {("1", "2"), ("2", "1")},
        "study": {("2", "1")},
        "patient": set(),
    }[exclude]
    assert {hit["series_uid"] for hit in hits} == {Identity("EXCLUDE", *each).series_uid for each in expected}


def test_slices_that_come_later_make_one_new_whole_embedding(http):
    files = slice_files(Identity("LATER"), count=6)
    uid = Identity("LATER").series_uid
    embed(http, files[:4])

    (series,) = embed(http, files[4:])["series"]

    assert (series["received"], series["duplicates"]) == (2, 0)
    bag = http.get(f"/v1/series/{uid}/embeddings").json()
    assert [each["z_mm"] for each in bag["slices"]] == [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]
    query = {"series_uid": uid, "slice": 0, "window": "lung", "k": 100, "filters": {"series_uid": uid}}
    assert sorted(hit["slice"] for hit in http.post("/v1/search", json=query).json()["hits"]) == list(range(6))


def test_a_job_is_told_as_events_until_it_ends(http):
    job = post(http, slice_files(Identity("EVENTS"))).json()["job_id"]

    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        events = [line for line in answer.iter_lines() if line.startswith("data:")]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert '"state":"done"' in events[-1]
    assert '"done":6,"known":6' in events[-1]


def test_lists_go_by_cursor(http):
    for number in range(3):
        embed(http, slice_files(Identity(f"PAGED-{number}"), count=1))
    everything = [each["series_uid"] for each in http.get("/v1/series", params={"limit": 1000}).json()["series"]]

    paged, cursor = [], {}
    while cursor is not None:
        page = http.get("/v1/series", params={"limit": 2, **cursor}).json()
        paged += [each["series_uid"] for each in page["series"]]
        cursor = {"cursor": page["next_cursor"]} if page["next_cursor"] else None

    assert paged == everything == sorted(everything)


def test_the_list_can_be_narrowed(http):
    embed(http, slice_files(Identity("NARROW"), count=1))
    uid = Identity("NARROW").series_uid

    for query in ({"patient_id": "NARROW"}, {"study_uid": Identity("NARROW").study_uid}):
        assert [each["series_uid"] for each in http.get("/v1/series", params=query).json()["series"]] == [uid]
    assert uid in [each["series_uid"] for each in http.get("/v1/series?state=indexed&limit=1000").json()["series"]]
    assert http.get("/v1/series?state=rejected&patient_id=NARROW").json()["series"] == []


def test_encoders_say_what_they_are_and_how_to_get_them(http):
    listed = {each["name"]: each for each in http.get("/v1/encoders").json()["encoders"]}

    assert listed["efficientnet_lite0"]["default"] and listed["efficientnet_lite0"]["weights_present"]
    assert listed["efficientnet_lite0"]["windows"] == [
        {"name": "abdomen", "low": -175.0, "high": 275.0},
        {"name": "lung", "low": -1500.0, "high": 500.0},
    ]
    assert (listed["mambaout_tiny"]["dim"], listed["mambaout_tiny"]["encoder_id"]) == (576, None)
    assert "keyslice fetch mambaout_tiny --revision" in listed["mambaout_tiny"]["how_to_get"]


def test_it_is_healthy_and_ready(http):
    assert http.get("/healthz").json()["status"] == "ok"
    ready = http.get("/readyz").json()
    assert ready["status"] == "ready"
    assert ready["canary_cosine"] == pytest.approx(1.0, abs=1e-4)


def test_the_other_large_real_series_runs_whole(http, data):
    archive = data / "lidc-idri-0314" / "lidc-idri-0314.tar.xz"
    with tarfile.open(archive) as tar:
        count = sum(member.name.endswith(".dcm") for member in tar)

    (series,) = embed(http, [(archive.name, archive.read_bytes())])["series"]

    npy = http.get(f"/v1/series/{series['series_uid']}/embeddings", headers={"Accept": "application/x-npy"})
    assert np.load(io.BytesIO(npy.content)).shape == (count, 2, 1280) == (275, 2, 1280)


def test_a_picture_is_shown_from_low_to_high_hu(http, series_uid):
    at = f"/v1/series/{series_uid}/slices/66/image"
    named = http.get(at, params={"window": "lung"}).content
    assert http.get(at, params={"low": -1500, "high": 500}).content == named
    for query in ({"low": 3}, {"high": 3}, {"low": 3, "high": 3}, {"low": 1e9, "high": 2}):
        assert http.get(at, params=query).status_code == 422
