"""Every way of running a network gives the embeddings of plain eager fp32."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models.calibrate import calibrate, lowest_cosine, sample
from models.encoders.timm_import import timm
from models.load import load_encoder
from models.modes import BULK, COSINE, EAGER, EXACT, FAST, Way, by_id, in_mode, measured, run_as
from models.runtimes import CannotRun, PackedLinear, start, with_packed_linears
from models.specs import encoder_id
from models.zoo import TEST

EVERY = tuple(dict.fromkeys((*EXACT, *FAST, *BULK)))
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weights directory with a small MambaOut whose embeddings differ from slice to slice."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = timm.create_model("test_mambaout")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_file(network.state_dict(), folder / "test_mambaout.safetensors")
    return folder


@pytest.fixture(scope="module")
def slices():
    return sample(TEST, 8)


@pytest.mark.parametrize("way", EVERY, ids=str)
def test_a_way_of_running_gives_the_embeddings_of_eager_fp32(way, weights, slices):
    expected = load_encoder(TEST, weights).encode(slices)

    embeddings = load_encoder(run_as(TEST, way), weights).encode(slices)

    assert lowest_cosine(expected[:1], expected[4:5]) < 0.999  # slices differ by more than the tolerance
    assert lowest_cosine(embeddings, expected) >= (COSINE["exact"] if way in EXACT else 0.9995)


@pytest.mark.parametrize("way", EXACT, ids=str)
def test_in_exact_mode_a_slice_has_the_same_bytes_anywhere_in_a_batch_and_in_another_process(way, weights, slices):
    encoder = load_encoder(run_as(TEST, way), weights)
    there = np.roll(slices, 3, axis=0)
    script = (
        "import hashlib, sys; from pathlib import Path; from models.calibrate import sample; "
        "from models.load import load_encoder; from models.modes import Way, run_as; from models.zoo import TEST; "
        f"encoder = load_encoder(run_as(TEST, {way!r}), Path(sys.argv[1])); "
        "print(hashlib.sha256(encoder.encode(sample(TEST, 8)).tobytes()).hexdigest())"
    )

    embeddings = encoder.encode(slices)
    other = subprocess.run(
        [sys.executable, "-c", script, weights], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )

    np.testing.assert_array_equal(encoder.encode(there), np.roll(embeddings, 3, axis=0))
    assert other.stdout.strip() == hashlib.sha256(embeddings.tobytes()).hexdigest()


def test_packed_linears_are_linears_and_the_network_keeps_its_own():
    network = nn.Sequential(nn.Linear(7, 5), nn.GELU(), nn.Sequential(nn.Linear(5, 3, bias=False))).requires_grad_(
        False
    )
    inputs = torch.randn(2, 4, 7)

    packed = with_packed_linears(network)

    assert [type(each) for each in network.modules() if isinstance(each, nn.Linear)] == [nn.Linear, nn.Linear]
    assert len([each for each in packed.modules() if isinstance(each, PackedLinear)]) == 2
    torch.testing.assert_close(packed(inputs), network(inputs), atol=1e-6, rtol=1e-6)


def test_what_is_exported_or_compiled_is_kept_for_the_next_process(weights):
    def kept():
        return {path.name: path.stat().st_mtime_ns for path in (weights / "compiled").iterdir()}

    for way in (Way("onnxruntime", "fp32"), Way("inductor", "bf16")):
        load_encoder(run_as(TEST, way), weights)
        before = kept()
        load_encoder(run_as(TEST, way), weights)
        assert kept() == before
    assert {Path(name).suffix for name in kept()} == {".onnx", ".pt2", ".lock"}


class Undecided(nn.Module):
    """Eager PyTorch runs it; nothing that must know the graph beforehand can."""

    def forward(self, images):
        return images.mean(dim=(2, 3)) if float(images.sum()) > 0 else images.amax(dim=(2, 3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "inductor"])
def test_a_network_that_a_runtime_cannot_take_is_refused_with_the_reason(runtime, tmp_path):
    example = torch.rand(2, 1, 4, 4)
    start("torch-eager", "fp32", Undecided(), example, tmp_path / "undecided")(example)

    with pytest.raises(CannotRun, match=f"{runtime} fp32: "):
        start(runtime, "fp32", Undecided(), example, tmp_path / "undecided")
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_the_best_way_of_a_mode_is_measured_once_and_decides_the_id(weights):
    plain, said = encoder_id(TEST, weights), []
    assert in_mode(TEST, "fast", weights) == TEST  # nothing was measured yet

    found = calibrate(TEST, "fast", weights, said.append)

    rates = found["slices_per_s"]
    best = Way(found["runtime"], found["precision"])
    assert set(rates) | set(found["refused"]) == {str(way) for way in FAST}
    assert rates[str(best)] >= max(rates.values()) / 1.1**3  # no other is clearly faster than the one before it
    assert in_mode(TEST, "fast", weights) == run_as(TEST, best)
    assert (encoder_id(in_mode(TEST, "fast", weights), weights) == plain) == (best == EAGER)
    said.clear()
    assert calibrate(TEST, "fast", weights, said.append) == found
    assert said == []
    assert measured(weights)[plain].keys() == {"fast"}  # other modes have choices of their own
    assert in_mode(TEST, "bulk", weights) == TEST


def test_every_way_has_an_id_of_its_own_and_is_found_by_it(weights):
    ids = {way: encoder_id(run_as(TEST, way), weights) for way in EVERY}

    assert len(set(ids.values())) == len(EVERY)
    for way, found in ids.items():
        assert by_id(TEST, found, weights) == run_as(TEST, way)
    assert by_id(TEST, "test_mambaout@000000000000", weights) is None
