"""Encoders beside the service's own, through HTTP and the command: another network, a volume, a licence."""

import io
import json
import os
import subprocess
import sys

import httpx
import numpy as np
import pytest
import torch
from posting import embed, post, slice_files, wait
from safetensors.torch import save_file

from models.ct.phantom import Identity
from models.ct.volume import prepare_volume
from models.encoders import i3resnet
from models.encoders.timm_import import timm
from models.load import load_encoder
from models.modes import in_mode
from models.specs import encoder_id
from models.zoo import ENCODERS, TEST, TEST_VOLUME
from service.embedded import in_background

NPY = {"Accept": "application/x-npy"}
PATIENT = Identity("VOLUME")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights made on the spot of the two small networks, and of one whose licence is not stated."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_file(timm.create_model("test_mambaout").state_dict(), folder / "test_mambaout.safetensors")
    save_file(i3resnet.build("test_i3_resnet").state_dict(), folder / "test_i3resnet.safetensors")
    (folder / "clear_mambaout_tiny.pth.tar").write_bytes(b"never opened")
    return folder


@pytest.fixture(scope="module")
def environment(weights, tmp_path_factory):
    return {
        "KEYSLICE_DATA_DIR": str(tmp_path_factory.mktemp("choice")),
        "KEYSLICE_WEIGHTS_DIR": str(weights),
        "KEYSLICE_ENCODER": "test_mambaout",
        "KEYSLICE_MODE": "fast",
    }


@pytest.fixture(scope="module")
def http(environment, tmp_path_factory):
    variables = {name: value for name, value in environment.items() if name != "KEYSLICE_DATA_DIR"}
    with (
        in_background(tmp_path_factory.mktemp("unused").parent / "choice-data", **variables) as running,
        httpx.Client(base_url=running.address, timeout=60) as client,
    ):
        yield client


def keyslice(environment, *arguments):
    command = [sys.executable, "-m", "service.cli", *arguments]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300, check=False)


def test_the_services_encoder_runs_as_its_mode_was_measured_best(http, weights):
    files = slice_files(Identity("FAST"), count=3, size=64)
    embed(http, files)

    answer = http.get(f"/v1/series/{Identity('FAST').series_uid}/embeddings").json()

    spec = in_mode(TEST, "fast", weights)
    assert answer["encoder_id"] == encoder_id(spec, weights)
    (listed,) = [each for each in http.get("/v1/encoders").json()["encoders"] if each["default"]]
    assert (listed["encoder_id"], listed["runtime"], listed["precision"]) == (
        answer["encoder_id"],
        spec.runtime,
        spec.precision,
    )


def test_a_series_can_be_embedded_by_the_plain_encoder_of_the_same_weights_too(http, weights):
    identity = Identity("PLAIN")
    files = slice_files(identity, count=3, size=64)
    plain = encoder_id(TEST, weights)
    embed(http, files, encoder=plain)

    answer = http.get(f"/v1/series/{identity.series_uid}/embeddings", params={"encoder": plain}).json()

    assert answer["encoder_id"] == plain
    assert np.array(answer["embeddings"]).shape == (3, 2, 64)


def test_a_volume_encoder_gives_a_bag_of_one_instance(http, weights, tmp_path):
    files = slice_files(PATIENT, count=9, size=32)
    embed(http, files, encoder="test_i3resnet")
    path, query = f"/v1/series/{PATIENT.series_uid}/embeddings", {"encoder": "test_i3resnet"}

    answer = http.get(path, params=query).json()

    for name, content in files:
        (tmp_path / name).write_bytes(content)
    encoder, volume = load_encoder(TEST_VOLUME, weights), np.zeros((1, 1, 16, 32, 32), np.float32)
    prepare_volume(list(tmp_path.iterdir()), volume[0], (5.0, 1.5, 1.5), TEST_VOLUME.windows[0], "merlin")
    expected = encoder.encode(volume).astype(np.float16)
    bag = np.load(io.BytesIO(http.get(path, params=query, headers=NPY).content))
    assert bag.shape == (1, 1, 128)
    np.testing.assert_array_equal(bag, expected)
    assert answer["windows"] == ["wide"]
    assert [(each["slice"], each["z_mm"]) for each in answer["slices"]] == [(0, 20.0)]  # the middle of 0 to 40 mm
    assert answer["receipt"]["kind"] == "volume3d"
    assert answer["receipt"]["geometry"]["slices"] == 9
    (hit,) = http.post(
        "/v1/search", json={"series_uid": PATIENT.series_uid, "slice": 0, "window": "wide", "k": 1, **query}
    ).json()["hits"]
    assert hit["series_uid"] == PATIENT.series_uid


def test_a_series_that_makes_no_volume_is_rejected_with_the_reason(http):
    identity = Identity("FLAT")
    answer = post(http, slice_files(identity, count=1), encoder="test_i3resnet")
    wait(http, answer.json()["job_id"])

    series = http.get(f"/v1/series/{identity.series_uid}").json()

    assert series["state"] == "rejected"
    assert "expected two at least" in json.dumps(series)


def test_an_encoder_whose_licence_forbids_commercial_use_is_refused_before_its_weights_are_opened(http):
    answer = post(http, slice_files(Identity("LICENCE"), count=1), encoder="clear_mambaout_tiny")

    assert answer.status_code == 403
    problem = answer.json()
    assert problem["type"] == "urn:keyslice:licence-not-accepted"
    assert "none stated" in problem["detail"]
    assert "KEYSLICE_NONCOMMERCIAL" in problem["detail"]
    assert http.get(f"/v1/series/{Identity('LICENCE').series_uid}").status_code == 404


def test_every_encoder_is_listed_with_licence_input_and_whether_it_may_be_used(environment):
    allowed = keyslice(environment | {"KEYSLICE_NONCOMMERCIAL": "true"}, "encoders", "--json")
    listed = json.loads(keyslice(environment, "encoders", "--json").stdout)["encoders"]

    assert [each["name"] for each in listed] == list(ENCODERS)
    found = {each["name"]: (each["permitted"], each["weights_present"], each["input_shape"]) for each in listed}
    assert found["test_i3resnet"] == (True, True, [1, 16, 32, 32])
    assert found["ct_clip"] == (False, False, [1, 240, 480, 480])
    assert found["clear_mambaout_tiny"] == (False, True, [2, 224, 224])
    assert all(each["permitted"] for each in json.loads(allowed.stdout)["encoders"])
    table = keyslice(environment, "encoders").stdout
    assert all(name in table for name in ENCODERS)


def test_verify_compares_a_fresh_canary_with_the_stored_one(environment, weights):
    first = keyslice(environment, "encoders", "verify")
    again = keyslice(environment, "encoders", "verify")
    volume = [keyslice(environment, "encoders", "verify", "test_i3resnet").stdout for _ in range(2)]

    assert "no canary was stored" in first.stdout
    assert again.returncode == 0
    assert "cosine 1.0000000 to the stored canary, largest difference 0.0e+00" in again.stdout
    assert "largest difference 0.0e+00" in volume[1]


def test_the_command_too_opens_weights_only_where_their_licence_permits_it(environment):
    refused = keyslice(environment, "encoders", "verify", "clear_mambaout_tiny")
    opened = keyslice(environment | {"KEYSLICE_NONCOMMERCIAL": "true"}, "encoders", "verify", "clear_mambaout_tiny")

    assert (refused.returncode, opened.returncode) == (2, 2)
    assert "none stated" in refused.stderr
    assert "not a readable weights file" in opened.stderr
    assert "Traceback" not in refused.stderr + opened.stderr
