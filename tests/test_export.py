"""A network of our own as an encoder: written whole or not at all, listed at once, loaded strictly."""

import errno
import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from posting import embed, slice_files
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from models.ct.phantom import Identity
from models.ct.slices import encoder_input
from models.ct.windows import LUNG, Window
from models.encoders import mambaout
from models.exported import BadSpec, read_spec
from models.lecl.card import Trained
from models.lecl.export import CannotExport, check_name, export_encoder
from models.load import load_encoder
from models.specs import MissingWeights, Weights, WrongWeights, encoder_id, how_to_get
from models.zoo import ENCODERS, TEST, encoders
from service.settings import Settings

TRAINED = Trained(
    objectives={"lecl": 1.0, "planting": 0.5},
    data="Two collections, 900 slices of 7 patients; one patient held out.",
    attribution="A. Author, A Collection, CC BY 4.0.",
    steps=1200,
    command="keyslice pretrain --config tiny.toml",
    versions={"keyslice": "0.1.0", "torch": "2.13"},
    figures={"probe_auroc": 0.81234},
    figures_of="weights trained without patient 3",
)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    network = mambaout.build("test_mambaout").eval()
    with torch.no_grad():  # so that rounding shows in every tensor
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


@pytest.fixture
def state(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def export(state, weights_dir, name="mine", half=True, **changes):
    return export_encoder(
        state, TEST, name=name, changes=changes, trained=TRAINED, weights_dir=weights_dir, half=half
    )  # fmt: skip


def embedded(network, instances, spec):
    """What the network itself says of (N, H, W) in [0, 1]: (N, dim)."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
    with torch.inference_mode():
        return network((torch.from_numpy(instances)[:, None].expand(-1, 3, -1, -1) - mean) / std).numpy()


def test_an_export_embeds_as_the_network_it_was_made_of(network, state, tmp_path):
    slices = np.random.default_rng(0).random((3, 1, 64, 64), dtype=np.float32)
    spec = export(state, tmp_path, "whole", half=False, input_size=64, windows=(LUNG,))

    found = load_encoder(spec, tmp_path).encode(slices)

    assert (spec.input_shape, found.shape) == ((1, 64, 64), (3, 1, 64))
    np.testing.assert_allclose(found[:, 0], embedded(network, slices[:, 0], spec), atol=1e-5)


def test_float16_weights_load_strictly_as_the_float32_numbers_they_stand_for(state, tmp_path):
    spec = export(state, tmp_path)
    stored = load_file(tmp_path / "mine" / "model.safetensors")
    rounded = mambaout.build("test_mambaout").eval()
    rounded.load_state_dict({name: value.half().float() for name, value in state.items()})
    slices = np.random.default_rng(0).random((1, 2, 96, 96), dtype=np.float32)

    encoder = load_encoder(spec, tmp_path)

    assert {value.dtype for value in stored.values()} == {torch.float16}
    loaded = encoder.network.network.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name].cpu(), value) for name, value in rounded.state_dict().items())
    np.testing.assert_allclose(encoder.encode(slices)[0], embedded(rounded, slices[0], spec), atol=1e-5)


def test_weights_inside_a_package_load_under_their_own_names(network, state, tmp_path, monkeypatch):
    folder = tmp_path / "packaged_encoders"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").touch()
    save_file({name: value.half() for name, value in state.items()}, folder / "weights" / "x.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    spec = replace(TEST, name="x", weights=Weights("package", "packaged_encoders/weights/x.safetensors"))
    slices = np.random.default_rng(0).random((1, 2, 96, 96), dtype=np.float32)

    found = load_encoder(spec, tmp_path / "nothing").encode(slices)

    np.testing.assert_allclose(found[0], embedded(network, slices[0], spec), atol=0.05)


def test_weights_missing_from_keyslice_itself_ask_for_keyslice(tmp_path):
    spec = replace(TEST, weights=Weights("package", "models/weights/none.safetensors"))

    assert how_to_get(spec) == "install Keyslice again: it comes with models/weights/none.safetensors"
    with pytest.raises(MissingWeights, match="install Keyslice again"):
        encoder_id(spec, tmp_path)


def test_an_export_is_listed_after_the_shipped_ones_as_it_was_answered(state, tmp_path):
    whole_numbers = Window("belly", low=-100, high=200)
    spec = export(state, tmp_path, windows=(whole_numbers,), licence="CC-BY-4.0", commercial_use=False)

    listed = encoders(tmp_path)

    assert list(listed) == [*ENCODERS, "mine"]
    assert listed["mine"] == spec
    assert encoder_id(listed["mine"], tmp_path) == encoder_id(spec, tmp_path)
    assert (spec.family, spec.network, spec.windows, spec.licence) == (
        "mambaout", "test_mambaout", (whole_numbers,), "CC-BY-4.0",
    )  # fmt: skip
    assert encoders(tmp_path / "nowhere") == ENCODERS


def test_other_weights_are_another_encoder_and_the_same_ones_the_same(state, tmp_path):
    other = state | {"network.head.norm.bias": state["network.head.norm.bias"] + 1}

    ids = [
        encoder_id(export(each, tmp_path / place), tmp_path / place)
        for place, each in (("a", state), ("b", state), ("c", other))
    ]

    assert ids[0] == ids[1] != ids[2]
    assert all(each.startswith("mine@") for each in ids)


def test_the_same_export_again_changes_nothing_and_another_of_that_name_is_refused(state, tmp_path):
    spec = export(state, tmp_path)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "mine").iterdir()}

    assert export(state, tmp_path) == spec
    with pytest.raises(CannotExport, match="expected a new name"):
        export(state, tmp_path, input_size=64)

    assert before.keys() == {"model.safetensors", "spec.json", "MODEL_CARD.md"}
    assert {path.name: path.stat().st_ino for path in (tmp_path / "mine").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_that_is_no_export_is_not_replaced(state, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")

    with pytest.raises(CannotExport, match="expected a new name"):
        export(state, tmp_path)

    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["", "Mine", "a-b", "a@b", "../mine", ".mine", "9a", "x" * 65, "compiled", *ENCODERS])
def test_names_that_are_malformed_or_shipped_are_refused_before_anything_is_written(state, tmp_path, name):
    with pytest.raises(CannotExport, match=r"expected (\[a-z\]|a new name)"):
        export(state, tmp_path, name)
    with pytest.raises(CannotExport):
        check_name(name)

    assert list(tmp_path.iterdir()) == []


def test_what_an_encoder_is_built_from_does_not_change(state, tmp_path):
    with pytest.raises(CannotExport, match="cannot change family, network, only commercial_use, dim"):
        export(state, tmp_path, family="vmamba", network="x", dim=64)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


BIAS = "network.head.norm.bias"


@pytest.mark.parametrize(
    ("spoilt", "changes", "said"),
    [
        (lambda state: without(state, BIAS), {}, rf'Missing key\(s\) in state_dict: "{BIAS}"\.'),
        (lambda state: state | {"projector.weight": torch.zeros(2)}, {}, r'Unexpected key.*"projector\.weight"'),
        (lambda state: state | {BIAS: torch.zeros(65)}, {}, f"size mismatch for {BIAS}"),
        (lambda state: state | {BIAS: torch.full((64,), torch.nan)}, {}, f"{BIAS} holds NaN, infinity, or numbers"),
        (lambda state: state | {BIAS: torch.full((64,), 1e6)}, {}, f"{BIAS} holds .* beyond torch.float16"),
        (lambda state: state, {"dim": 32}, r"the network gives \(2, 64\), expected \(2, 32\)"),
        (lambda state: state, {"mean": (0.5, 0.5), "std": (0.5, 0.5)}, r"does not take \(2, 96, 96\)"),
        (
            lambda state: state | {BIAS: torch.zeros(64), "network.head.norm.weight": torch.linspace(1e-8, 1e-7, 64)},
            {},
            "stored weights embed at cosine .* expected 0.9999",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_leave_nothing(state, tmp_path, spoilt, changes, said):
    with pytest.raises(WrongWeights, match=f"(?s){said}"):
        export(spoilt(state), tmp_path, **changes)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("good_writes", range(4))
def test_a_full_disk_leaves_nothing_of_an_export(state, tmp_path, monkeypatch, good_writes):
    fsync, left = os.fsync, [good_writes]

    def full(descriptor):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        fsync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "fsync", full)
        export(state, tmp_path)

    assert list(tmp_path.iterdir()) == []
    assert export(state, tmp_path) == encoders(tmp_path)["mine"]


def test_what_a_killed_export_leaves_is_not_listed(state, tmp_path):
    export(state, tmp_path / ".k3jd9")  # the folder that is renamed at the end
    (tmp_path / "half").mkdir()
    save_file(state, tmp_path / "half" / "model.safetensors")

    assert encoders(tmp_path) == ENCODERS


def changed(path, **fields):
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"encoder": content["encoder"] | fields}))


def dropped(path, field):
    content = json.loads(path.read_text())
    del content["encoder"][field]
    path.write_text(json.dumps(content))


ELSEWHERE = {"source": "export", "locator": "../secret.safetensors", "sha256": "0" * 64, "shards": []}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "Invalid JSON"),
        (lambda path: path.write_bytes(b""), "Invalid JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "Invalid JSON"),
        (lambda path: path.write_text("[" * 100_000), "Invalid JSON"),
        (
            lambda path: path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2')),
            "schema",
        ),
        (lambda path: changed(path, colour="red"), r"encoder\.colour: unknown"),
        (lambda path: dropped(path, "dim"), r"encoder\.dim: Field required"),
        (lambda path: dropped(path, "mean"), r"encoder\.mean: missing"),
        (lambda path: changed(path, dim="64"), r"encoder\.dim: .*integer"),
        (
            lambda path: changed(path, windows=[{"name": "a", "low": 0, "high": 1, "step": 2}]),
            "windows.0.step: unknown",
        ),
        (lambda path: changed(path, runtime="tea"), r"encoder\.runtime: "),
        (lambda path: changed(path, name="yours"), "named 'yours', expected its folder's name"),
        (lambda path: changed(path, family="os"), "family is 'os', expected one of biomedclip, "),
        (lambda path: changed(path, weights=ELSEWHERE), r"weights are export \.\./secret"),
        (
            lambda path: changed(path, weights=ELSEWHERE | {"locator": "mine/model.safetensors", "sha256": None}),
            "no SHA",
        ),
    ],
)
def test_a_broken_spec_is_named_and_takes_no_other_encoder_down(state, tmp_path, caplog, spoil, said):
    export(state, tmp_path, "sound")
    export(state, tmp_path)
    spoil(tmp_path / "mine" / "spec.json")

    with pytest.raises(BadSpec, match=f"^mine/spec.json: .*{said}"):
        read_spec(tmp_path / "mine" / "spec.json")
    assert list(encoders(tmp_path)) == [*ENCODERS, "sound"]
    assert list(encoders(tmp_path)) == [*ENCODERS, "sound"]
    assert [each.message.partition(": mine/")[0] for each in caplog.records] == ["an encoder is left out"]


def test_a_shipped_name_goes_before_an_export_of_that_name(state, tmp_path, monkeypatch, caplog):
    spec = export(state, tmp_path)
    shipped = replace(spec, weights=Weights("file", "mine"))
    monkeypatch.setitem(ENCODERS, "mine", shipped)

    assert encoders(tmp_path)["mine"] == shipped
    assert encoders(tmp_path)["mine"] == shipped
    assert [each.message for each in caplog.records] == [
        "the export mine is left out: Keyslice ships an encoder of that name"
    ]


def test_weights_that_were_changed_after_the_export_are_refused(state, tmp_path):
    spec = export(state, tmp_path)
    path = tmp_path / "mine" / "model.safetensors"
    save_file(state, path)

    with pytest.raises(WrongWeights, match=f"expected {spec.weights.sha256}"):
        encoder_id(spec, tmp_path)
    path.unlink()
    with pytest.raises(MissingWeights, match=r"put mine/model\.safetensors back"):
        encoder_id(spec, tmp_path)


def test_the_model_card_says_what_it_is_of_what_how_and_how_good(state, tmp_path):
    spec = export(state, tmp_path, input_size=64, licence="CC-BY-4.0", commercial_use=False)

    card = (tmp_path / "mine" / "MODEL_CARD.md").read_text()

    for said in (
        "# mine\n", "`test_mambaout`", "64 x 64 pixels", "lung -1500..500 HU", "64 numbers", spec.weights.sha256,
        "CC-BY-4.0; no commercial use", TRAINED.data, TRAINED.attribution, "1200 steps", "- lecl: 1\n- planting: 0.5\n",
        TRAINED.command, "- torch: 2.13\n", "Of weights trained without patient 3:\n\n- probe_auroc: 0.8123\n",
        "Not a medical device",
    ):  # fmt: skip
        assert said in card
    assert "Cosine of the stored to the trained weights' embeddings: 0.99999" in card


def test_an_export_may_be_the_services_own_encoder(state, tmp_path):
    export(state, tmp_path / "weights")

    assert Settings(data_dir=tmp_path, weights_dir=None, encoder="mine").encoder == "mine"
    with pytest.raises(ValidationError, match=r"unknown encoder 'yours', expected one of .*, mine"):
        Settings(data_dir=tmp_path, weights_dir=None, encoder="yours")
    with pytest.raises(ValidationError, match="unknown encoder 'mine'"):
        Settings(data_dir=tmp_path, weights_dir=tmp_path, encoder="mine")


def test_a_running_service_lists_a_new_export_and_embeds_with_it(http, weights_dir, state):
    before = http.get("/v1/encoders").json()["encoders"]
    spec = export(state, weights_dir, "made_while_serving", input_size=64, windows=(LUNG,))
    identity = Identity("EXPORT")
    files = slice_files(identity, count=3, size=64)

    (listed,) = [each for each in http.get("/v1/encoders").json()["encoders"] if each not in before]
    embed(http, files, encoder=spec.name)
    answer = http.get(
        f"/v1/series/{identity.series_uid}/embeddings",
        params={"encoder": spec.name},
        headers={"Accept": "application/x-npy"},
    )

    assert (listed["name"], listed["encoder_id"]) == (spec.name, encoder_id(spec, weights_dir))
    assert (listed["weights_present"], listed["input_shape"]) == (True, [1, 64, 64])
    assert listed["source"] == "export made_while_serving/model.safetensors"
    hu = np.stack([pixels(content) for _, content in files])
    slices = np.stack([encoder_input(each, spec.windows, spec.input_size) for each in hu])
    expected = load_encoder(spec, weights_dir).encode(slices).astype(np.float16)
    np.testing.assert_array_equal(np.load(io.BytesIO(answer.content)), expected)


def pixels(content):
    """HU of a DICOM file, read without us."""
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(content))
    return (dataset.pixel_array * dataset.RescaleSlope + dataset.RescaleIntercept).astype(np.float32)


def test_the_command_knows_an_export(state, tmp_path):
    spec = export(state, tmp_path)

    shown = keyslice(tmp_path, "encoders")
    fetched = keyslice(tmp_path, "fetch", "mine", "--revision", "0" * 40)

    assert encoder_id(spec, tmp_path) in shown.stdout
    assert "mine is not on a hub; put mine/model.safetensors back" in fetched.stderr.replace("\n", " ")


def keyslice(weights_dir, *arguments):
    variables = os.environ | {"KEYSLICE_DATA_DIR": str(weights_dir), "KEYSLICE_WEIGHTS_DIR": str(weights_dir)}
    command = [sys.executable, "-m", "service.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=120, check=False)
