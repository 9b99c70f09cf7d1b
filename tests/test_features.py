"""What is taken away is what is stored, as each format's own library reads it."""

import io
import json
import subprocess
import sys
import zipfile

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from cohort import COHORT, DIM, WINDOWS, Stored, fill, store
from fastapi.testclient import TestClient
from zarr.storage import ZipStore

from service.app import create_app
from service.features.bags import read_bag
from service.features.formats import FORMATS
from service.settings import Settings
from service.storage.stores import open_stores


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    return Settings(data_dir=tmp_path_factory.mktemp("features"), broker_url="redis://127.0.0.1:1/0")


@pytest.fixture(scope="module")
def encoder_id(settings):
    opened = open_stores(settings)
    yield fill(opened, settings)
    opened.close()


@pytest.fixture(scope="module")
def http(settings, encoder_id):
    with TestClient(create_app(settings)) as client:
        yield client


def taken(http, form, **query):
    answer = http.get("/v1/features", params={"format": form, **query})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == FORMATS[form].media_type
    return answer.content


def rows(windows=WINDOWS, cohort=COHORT):
    """(series, slice, window, SOP UID, z, vector) of every instance, by a loop over what was stored."""
    return [
        (each.series_uid, k, window, each.receipt["sop_uids"][k], each.receipt["z_mm"][k], each.bag[k, w])
        for each in cohort
        for k in range(each.slices)
        for w, window in enumerate(WINDOWS)
        if window in windows
    ]


def check_table(table, expected):
    found = zip(
        *(table[name].to_pylist() for name in ("series_uid", "slice", "window", "sop_uid", "z_mm")), strict=True
    )
    assert [*found] == [row[:5] for row in expected]
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(-1, DIM)
    np.testing.assert_array_equal(vectors, np.array([row[5] for row in expected]))


@pytest.mark.parametrize("window", [None, "lung"])
def test_parquet_and_arrow_hold_a_row_per_slice_and_window(http, encoder_id, window):
    query = {"window": window} if window else {}
    tables = [
        pq.read_table(io.BytesIO(taken(http, "parquet", **query))),
        pa.ipc.open_stream(taken(http, "arrow", **query)).read_all(),
    ]

    for table in tables:
        check_table(table, rows([window] if window else WINDOWS))
        about = json.loads(table.schema.metadata[b"keyslice"])
        assert about["encoder_id"] == encoder_id
        assert about["windows"] == ([window] if window else WINDOWS)
        receipts = [json.loads(each) for each in table["receipt"].to_pylist() if each]
        assert receipts == [each.receipt for each in COHORT]
        assert table["model"].to_pylist()[0] == "A1"


def test_parquet_of_many_series_has_row_groups_that_fit_in_memory(http, monkeypatch):
    monkeypatch.setattr("service.features.tables.BYTES_PER_GROUP", COHORT[0].bag.nbytes + 1)

    file = pq.ParquetFile(io.BytesIO(taken(http, "parquet")))

    assert [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)] == [14, 12]
    check_table(file.read(), rows())


def test_stamp_has_a_file_per_series_a_slide_table_and_receipts(http, encoder_id):
    archive = zipfile.ZipFile(io.BytesIO(taken(http, "stamp")))

    assert archive.testzip() is None
    names = [f"{each.series_uid}.h5" for each in COHORT]
    assert archive.namelist() == [*names, "slide.csv", "receipts.jsonl"]
    for each in COHORT:
        with h5py.File(io.BytesIO(archive.read(f"{each.series_uid}.h5"))) as file:
            check_stamp(file, each, encoder_id)
    slides = [line.split(",") for line in archive.read("slide.csv").decode().splitlines()]
    assert slides[0] == ["PATIENT", "FILENAME"]
    assert [line[1] for line in slides[1:]] == names
    assert slides[1][0] == slides[2][0] != slides[3][0]
    receipts = [json.loads(line) for line in archive.read("receipts.jsonl").splitlines()]
    assert [each["receipt"] for each in receipts] == [each.receipt for each in COHORT]


def check_stamp(file, each, encoder_id):
    """As STAMP 2.5 reads it: `detect_feature_type`, `BagDataset.__getitem__`, `get_coords` and `_read_h5`."""
    assert file.attrs.get("feat_type") == "tile"
    assert isinstance(file["feats"], h5py.Dataset)
    np.testing.assert_array_equal(file["feats"][()], each.bag.reshape(-1, DIM))
    assert not (file.attrs.get("tile_size") and file.attrs.get("unit") == "um")  # the branch of STAMP 2.0
    assert float(file.attrs["tile_size_um"]) == (2500.0 if each.slices > 1 else 1000.0)
    coords = file["coords"][:]
    assert coords.shape == (len(file["feats"]), 2)
    np.testing.assert_array_equal(coords[:, 0], np.repeat(each.receipt["z_mm"], 2) * 1000)
    assert file.attrs["stamp_version"] == "2.1.0"
    assert file.attrs["extractor"] == encoder_id
    assert json.loads(file["receipt"][()]) == each.receipt


def test_anndata_reads_its_observations(http, encoder_id, tmp_path):
    (tmp_path / "cohort.h5ad").write_bytes(taken(http, "anndata"))

    found = anndata.read_h5ad(tmp_path / "cohort.h5ad")

    expected = rows()
    assert found.shape == (len(expected), DIM)
    np.testing.assert_array_equal(found.X, np.array([row[5] for row in expected], np.float32))
    assert [*found.obs_names] == [f"{row[0]}/{row[1]}/{row[2]}" for row in expected]
    columns = ("series_uid", "slice", "window", "sop_uid", "z_mm")
    assert [*zip(*(found.obs[name] for name in columns), strict=True)] == [row[:5] for row in expected]
    assert found.obs["patient"].nunique() == 3
    assert [json.loads(each) for each in found.uns["receipts"]] == [
        {"series_uid": each.series_uid, **each.receipt} for each in COHORT
    ]
    assert json.loads(found.uns["about"])["encoder_id"] == encoder_id
    found.write_h5ad(tmp_path / "again.h5ad")  # what anndata reads whole it also writes
    assert anndata.read_h5ad(tmp_path / "cohort.h5ad", backed="r").X[3].tolist() == found.X[3].tolist()


@pytest.mark.parametrize("chunk_bytes", [4 * 2**20, 3 * 2 * DIM * 2])
def test_zarr_is_one_group_whose_chunks_cross_series(http, encoder_id, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr("service.features.zarr_zip.CHUNK_BYTES", chunk_bytes)
    (tmp_path / "cohort.zarr.zip").write_bytes(taken(http, "zarr"))

    with ZipStore(tmp_path / "cohort.zarr.zip", mode="r") as store:
        group = zarr.open_group(store, path="features", mode="r")
        embeddings, columns = group["embeddings"][:], {name: group[name][:] for name in ("series", "slice", "z_mm")}
        about, names = dict(group.attrs), sorted(name for name, _ in group.arrays())

    np.testing.assert_array_equal(embeddings, np.concatenate([each.bag for each in COHORT]))
    assert names == ["embeddings", "series", "slice", "z_mm"]
    assert about["encoder_id"] == encoder_id
    lines = zipfile.ZipFile(tmp_path / "cohort.zarr.zip").read("receipts.jsonl").splitlines()
    receipts = [json.loads(line) for line in lines]
    for k, (number, slice_number, z_mm) in enumerate(zip(*columns.values(), strict=True)):
        line = receipts[number]
        assert rows(["lung"])[k][0] == line["series_uid"]
        assert line["receipt"]["z_mm"][slice_number] == z_mm


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ({}, [1, 2, 3, 4]),
        ({"patient_id": "ADA"}, [1, 2]),
        ({"patient_id": ["ADA", "BOB"], "manufacturer": "siemens"}, [3]),
        ({"study_uid": ["1.2.2", "1.2.4"]}, [2, 4]),
        ({"series_uid": ["1.2.3.4", "1.2.3.1", "9.9"]}, [1, 4]),
        ({"date_from": "2002-01-31"}, [2, 4]),
        ({"date_to": "20020131"}, [1, 2]),
        ({"date_from": "2002-01-01", "date_to": "2002-12-31"}, [2]),
        ({"modality": "CT"}, [3]),
        ({"body_part": "chest"}, [1, 2]),
        ({"body_part": "CHEST", "kernel": "lung"}, [2]),
        ({"verdict": "accepted_with_warnings"}, [4]),
    ],
)
def test_every_condition_that_is_set_must_hold(http, query, numbers):
    table = pa.ipc.open_stream(taken(http, "arrow", **query)).read_all()

    check_table(table, rows(cohort=[each for each in COHORT if each.number in numbers]))


def test_patients_are_opaque_unless_they_are_asked_for(http):
    secret = {each.patient_id.encode() for each in COHORT}
    for form in FORMATS:
        content = taken(http, form, patient_id=["ADA", "BOB", "CYD"])
        if form in ("stamp", "zarr"):
            archive = zipfile.ZipFile(io.BytesIO(content))
            content = b"".join(archive.read(name) for name in archive.namelist() if "embeddings" not in name)
            content = content if form == "zarr" else archive.read("slide.csv") + archive.read("receipts.jsonl")
        elif form == "arrow":
            content = str(pa.ipc.open_stream(content).read_all().drop(["vector"]).to_pylist()).encode()
        elif form == "parquet":
            content = str(pq.read_table(io.BytesIO(content)).drop(["vector"]).to_pylist()).encode()
        else:
            content = h5py.File(io.BytesIO(content))["obs/patient/categories"][()].tobytes()
        assert not any(name in content for name in secret), form
    named = pa.ipc.open_stream(taken(http, "arrow", patients="id")).read_all()
    assert {*named["patient"].to_pylist()} == {"ADA", "BOB", "CYD"}


@pytest.mark.parametrize(
    ("query", "status", "said"),
    [
        ({"patient_id": "nobody"}, 404, "no series with embeddings of"),
        ({"date_from": "2050-01-01"}, 404, "meets the filter"),
        ({"format": "csv"}, 422, "'parquet', 'arrow', 'stamp', 'anndata' or 'zarr'"),
        ({"encoder": "resnet"}, 404, "no encoder 'resnet'"),
        ({"encoder": "mambaout_tiny"}, 409, "mambaout_tiny"),
        ({"window": "bone"}, 404, "no window 'bone'"),
        ({"colour": "red"}, 422, "Extra inputs"),
        ({"date_from": "yesterday"}, 422, "date_from"),
        ({"verdict": "fine"}, 422, "verdict"),
        ({"kernel": "a\0b"}, 422, "kernel"),
    ],
)
def test_what_cannot_be_taken_away_is_refused_with_the_reason(http, query, status, said):
    answer = http.get("/v1/features", params=query)

    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert said in answer.json()["detail"]
    assert "nobody" not in answer.text


def test_a_bag_that_is_replaced_while_it_is_read_is_read_as_it_is_now(settings, encoder_id):
    stores = open_stores(settings)
    key = store(Stored(5, "DOT", 2), stores, encoder_id)
    before = stores.cohorts.member(key)
    later = Stored(5, "DOT", 6)
    stores.bags.put(key, "later", later.bag, later.receipt)
    stores.catalog.commit(key, "later", 6, {"status": "accepted"}, {})
    stores.bags.keep_only(key, {"later"})

    np.testing.assert_array_equal(read_bag(before, None, stores).vectors, later.bag)

    stores.bags.keep_only(key, set())
    assert read_bag(before, None, stores) is None
    stores.close()


def test_one_series_comes_as_arrow_and_hdf5_too(http, encoder_id):
    each = COHORT[0]
    path = f"/v1/series/{each.series_uid}/embeddings"

    stream = http.get(path, headers={"Accept": "application/vnd.apache.arrow.stream"}, params={"window": "lung"})
    check_table(pa.ipc.open_stream(stream.content).read_all(), rows(["lung"], [each]))

    hdf5 = http.get(path, headers={"Accept": "application/x-hdf5"})
    assert hdf5.headers["content-type"] == "application/x-hdf5"
    with h5py.File(io.BytesIO(hdf5.content)) as file:
        check_stamp(file, each, encoder_id)

    npy = http.get(path, headers={"Accept": "application/x-npy"})
    np.testing.assert_array_equal(np.load(io.BytesIO(npy.content)), each.bag)
    assert http.get(path).json()["embeddings"] == each.bag.tolist()


def test_nothing_is_left_behind_in_staging(http, settings):
    for form in FORMATS:
        taken(http, form)

    assert [*settings.staging_dir.iterdir()] == []


FLAT = """
import resource, sys
from pathlib import Path
import numpy as np
from service.features.bags import FeatureBag
from service.features.formats import FORMATS

def bags(count, slices=250, windows=("abdomen", "lung"), dim=1280):
    vectors = np.random.default_rng(0).normal(size=(slices, 2, dim)).astype(np.float16)
    for number in range(count):
        uid = f"1.2.{number}"
        uids = [f"{uid}.{k}" for k in range(slices)]
        receipt = {"sop_uids": uids, "z_mm": [1.0 * k for k in range(slices)], "geometry": {}}
        yield FeatureBag(uid, uid, uid, "", "", "", "", windows, vectors, receipt)

def write(count):
    about = {"encoder_id": "toy@0", "windows": ["abdomen", "lung"]}
    return sum(len(piece) for piece in FORMATS[sys.argv[1]].write(bags(count), about, 1280, Path(sys.argv[2])))

write(30)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
written = write(200)
print(written, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("form", FORMATS)
def test_memory_stays_flat_over_many_series(form, tmp_path):
    command = [sys.executable, "-c", FLAT, form, str(tmp_path)]
    written, grown = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())

    assert written > 200 * 250 * 2 * DIM * 2
    assert grown < 0.1 * written
