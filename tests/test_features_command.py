"""`keyslice features get` against a running service: all of the file, or none."""

import json
import socket
import subprocess
import sys
import threading

import anndata
import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from posting import embed, slice_files

from models.ct.phantom import Identity

IDENTITY = Identity("FEATURES-COMMAND")


def keyslice(*arguments):
    command = [sys.executable, "-m", "service.cli", "features", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def bag(http):
    """Of a real series: posted, embedded by a worker, as GET .../embeddings answers it."""
    embed(http, slice_files(IDENTITY))
    return http.get(f"/v1/series/{IDENTITY.series_uid}/embeddings").raise_for_status().json()


def test_a_workers_embeddings_arrive_value_by_value(service, bag, tmp_path):
    path = tmp_path / "one.parquet"
    answer = keyslice(
        "get", path, "--series-uid", IDENTITY.series_uid, "--patient-ids", "--json", "--service", service.address
    )

    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout) == {
        "path": str(path),
        "bytes": path.stat().st_size,
        "encoder_id": bag["encoder_id"],
        "windows": bag["windows"],
        "series": 1,
        "slices": 6,
    }
    table = pq.read_table(path)
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(6, 2, bag["dim"])
    np.testing.assert_array_equal(vectors, np.array(bag["embeddings"], np.float16))
    assert {*table["patient"].to_pylist()} == {IDENTITY.patient_id}
    assert json.loads(table["receipt"][0].as_py()) == bag["receipt"]
    assert [*tmp_path.iterdir()] == [path]


def test_the_files_name_says_the_format(service, bag, tmp_path):
    for name in ("one.h5ad", "one.arrows", "one.zarr.zip"):
        answer = keyslice("get", tmp_path / name, "--series-uid", IDENTITY.series_uid, "--service", service.address)
        assert answer.returncode == 0, answer.stderr
        assert "6 slices of 1 series" in answer.stdout
    assert anndata.read_h5ad(tmp_path / "one.h5ad").shape == (12, bag["dim"])
    unknown = keyslice("get", tmp_path / "one.csv", "--service", service.address)
    assert unknown.returncode == 2
    assert "give --format, one of parquet, arrow, stamp, anndata, zarr" in unknown.stderr


def test_stamps_zip_unpacks_into_what_stamp_reads(service, bag, tmp_path):
    path = tmp_path / "stamp.zip"
    keyslice("get", path, "--series-uid", IDENTITY.series_uid, "--service", service.address)
    subprocess.run([sys.executable, "-m", "zipfile", "-e", path, tmp_path], check=True)

    with h5py.File(tmp_path / f"{IDENTITY.series_uid}.h5") as file:
        assert file["feats"].shape == (12, bag["dim"])
        assert file.attrs["tile_size_um"] == 5000


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--kernel", "no such kernel"], 1, "404: no series with embeddings of"),
        (["--encoder", "resnet"], 1, "404: no encoder 'resnet'"),
        (["--date-from", "yesterday"], 1, "422: "),
    ],
)
def test_a_refusal_leaves_no_file_and_the_old_one_as_it_was(service, bag, tmp_path, arguments, status, said):
    path = tmp_path / "cohort.parquet"
    path.write_text("of last week")

    answer = keyslice("get", path, *arguments, "--service", service.address)

    assert answer.returncode == status
    assert said in answer.stderr
    assert path.read_text() == "of last week"
    assert [*tmp_path.iterdir()] == [path]


def test_a_directory_that_is_not_there_is_a_wrong_command(tmp_path):
    answer = keyslice("get", tmp_path / "nowhere" / "cohort.parquet")

    assert answer.returncode == 2
    assert "expected a file in a directory that is there" in answer.stderr.replace("\n", " ")


def test_a_service_that_breaks_off_leaves_no_file(tmp_path):
    server = socket.create_server(("127.0.0.1", 0))

    def answer_half():
        connection, _ = server.accept()
        connection.recv(65536)
        names = "X-Keyslice-Series: 2\r\nX-Keyslice-Slices: 9\r\nX-Keyslice-Encoder: e\r\nX-Keyslice-Windows: w\r\n"
        connection.sendall(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n{names}\r\n4\r\nPAR1\r\n".encode())
        connection.close()

    thread = threading.Thread(target=answer_half)
    thread.start()
    answer = keyslice("get", tmp_path / "half.parquet", "--service", f"http://127.0.0.1:{server.getsockname()[1]}")
    thread.join()
    server.close()

    assert answer.returncode == 1
    assert "broke off while it answered" in answer.stderr.replace("\n", " ")
    assert [*tmp_path.iterdir()] == []


def test_a_service_that_is_not_there_is_named(tmp_path):
    answer = keyslice("get", tmp_path / "cohort.parquet", "--service", "http://127.0.0.1:9")

    assert answer.returncode == 1
    assert "no service answers at http://127.0.0.1:9" in answer.stderr.replace("\n", " ")
