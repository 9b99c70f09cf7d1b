import dataclasses
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.encoders import mambaout
from models.encoders.timm_import import timm
from models.load import Embedding, load_encoder
from models.specs import MissingWeights, Weights, WrongWeights, encoder_id, locate_weights
from models.zoo import ENCODERS

LITE0, OWN = ENCODERS["efficientnet_lite0"], ENCODERS["test_mambaout"]


@pytest.fixture(scope="module", autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lite0(tmp_path_factory):
    return load_encoder(LITE0, tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def classifier():
    """timm's own small MambaOut with its classifier, random weights."""
    torch.manual_seed(0)
    network = timm.create_model("test_mambaout").eval()
    with torch.no_grad():  # so that leaving out or doubling a norm shows
        network.head.norm.weight.uniform_(0.5, 2)
        network.head.norm.bias.uniform_(-1, 1)
    return network


@pytest.fixture
def own_weights(tmp_path, classifier):
    """A weights directory that holds it."""
    save_file(classifier.state_dict(), tmp_path / "test_mambaout.safetensors")
    return tmp_path


def random_slices(count, size, windows=2, seed=0):
    return np.random.default_rng(seed).random((count, windows, size, size), dtype=np.float32)


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_lite0_gives_the_pooled_features_of_timms_network_with_its_classifier(lite0, tmp_path):
    state = torch.load(locate_weights(LITE0, tmp_path), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0").eval()  # with the classifier: every tensor has its place
    ours = network.state_dict()
    assert len(state) == len(ours)
    for (theirs, value), (name, place) in zip(state.items(), ours.items(), strict=True):
        assert value.shape == place.shape, (theirs, name)
        place.copy_(value)
    slices = random_slices(2, 224)

    embeddings = lite0.encode(slices)

    images = torch.from_numpy(np.repeat(slices.reshape(4, 1, 224, 224), 3, axis=1)) * 2 - 1  # mean and std 0.5
    with torch.inference_mode():
        features = network.forward_features(images).mean(dim=(2, 3)).numpy()
    assert embeddings.shape == (2, 2, 1280)
    np.testing.assert_allclose(embeddings.reshape(4, 1280), features, atol=1e-5)


def test_lite0_holds_the_packages_own_tensors(lite0, tmp_path):
    state = torch.load(locate_weights(LITE0, tmp_path), weights_only=True)
    network = lite0.network.network.state_dict()

    assert torch.equal(network["conv_stem.weight"].cpu(), state["_conv_stem.weight"])
    assert torch.equal(network["blocks.0.0.bn1.running_var"].cpu(), state["_blocks.0._bn1.running_var"])
    assert torch.equal(network["bn2.bias"].cpu(), state["_bn1.bias"])


def test_an_embedding_does_not_depend_on_its_batch(lite0):
    slices = random_slices(4, 224)

    together = lite0.encode(slices)
    alone = np.concatenate([lite0.encode(each[np.newaxis]) for each in slices])

    assert cosine(together, alone).min() >= 0.999999
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_networks_know_two_slices_apart(lite0):
    black, white = np.zeros((1, 2, 224, 224), np.float32), np.ones((1, 2, 224, 224), np.float32)

    assert cosine(lite0.encode(black), lite0.encode(white)).max() < 0.99


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LITE0, [0.5, 0.5, 0.5]),
        (OWN, [(0.75 - 0.485) / 0.229, (0.75 - 0.456) / 0.224, (0.75 - 0.406) / 0.225]),  # ImageNet's
    ],
)
def test_slices_are_normalised_as_the_network_was_trained(spec, expected):
    images = Embedding(torch.nn.Identity(), spec.mean, spec.std, axes=2)(torch.full((1, 1, 1, 1), 0.75))

    np.testing.assert_allclose(images.flatten().numpy(), expected, rtol=1e-6)


def test_a_mambaout_embedding_is_the_norm_of_the_mean_over_the_last_map(own_weights, classifier):
    slices = random_slices(3, 96)

    embeddings = load_encoder(OWN, own_weights).encode(slices)

    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (OWN.mean, OWN.std))
    images = torch.from_numpy((np.repeat(slices.reshape(6, 1, 96, 96), 3, axis=1) - mean) / std)
    with torch.inference_mode():
        pooled = classifier.forward_features(images).numpy().astype(np.float64).mean(axis=(1, 2))
    centred = pooled - pooled.mean(axis=1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + classifier.head.norm.eps)
    expected = normed * classifier.head.norm.weight.detach().numpy() + classifier.head.norm.bias.detach().numpy()
    assert embeddings.shape == (3, 2, 64)
    np.testing.assert_allclose(embeddings.reshape(6, 64), expected, atol=1e-4)


def test_mambaout_tiny_gives_576_dimensions():
    state = timm.create_model("mambaout_tiny").state_dict()
    network = mambaout.build("mambaout_tiny").eval()

    network.load_state_dict(mambaout.adapt(state, network), strict=True)

    with torch.inference_mode():
        assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 576)
    assert ENCODERS["mambaout_tiny"].dim == 576


def test_networks_are_in_evaluation_mode_and_ask_for_no_gradient(lite0, own_weights):
    for encoder in (lite0, load_encoder(OWN, own_weights)):
        assert not any(module.training for module in encoder.network.modules())
        assert not any(parameter.requires_grad for parameter in encoder.network.parameters())


def test_an_encoder_carries_the_id_of_its_spec_and_weights(own_weights):
    encoder = load_encoder(OWN, own_weights)

    assert encoder.id == encoder_id(OWN, own_weights)
    assert encoder.id == f"test_mambaout@{encoder.fingerprint[:12]}"


def test_any_number_of_slices_goes_through_the_network_in_one_shape(own_weights):
    encoder = load_encoder(OWN, own_weights)
    shapes = []
    encoder.network.register_forward_pre_hook(lambda _module, inputs: shapes.append(tuple(inputs[0].shape)))
    slices = random_slices(19, 96)

    together = encoder.encode(slices)

    assert together.shape == (19, 2, 64)
    assert shapes == [(16, 1, 96, 96)] * 3
    np.testing.assert_array_equal(together[11:12], encoder.encode(slices[11:12]))


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


def as_file(spec, folder, content):
    """The spec with its weights in a file of the weights directory: a state to save, or bytes."""
    path = folder / f"{spec.name}.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    return dataclasses.replace(spec, weights=Weights("file", spec.name))


@pytest.fixture(scope="module")
def lite0_state(tmp_path_factory):
    return torch.load(locate_weights(LITE0, tmp_path_factory.mktemp("empty")), weights_only=True)


def refused(spec, folder):
    with pytest.raises(WrongWeights) as error:
        load_encoder(spec, folder)
    return str(error.value)


def test_the_packages_tensors_are_accepted_from_a_file_too(tmp_path, lite0_state):
    load_encoder(as_file(LITE0, tmp_path, lite0_state), tmp_path)


def test_a_truncated_weights_file_is_refused(tmp_path, own_weights, lite0_state):
    whole = locate_weights(LITE0, tmp_path).read_bytes()
    safetensors = own_weights / "test_mambaout.safetensors"
    safetensors.write_bytes(safetensors.read_bytes()[:-1000])

    assert "not a readable weights file" in refused(as_file(LITE0, tmp_path, whole[: len(whole) // 2]), tmp_path)
    assert "not a readable weights file" in refused(OWN, own_weights)


def test_a_tensor_of_another_shape_is_refused(tmp_path, own_weights, classifier, lite0_state):
    lite0_name, own_name = "_blocks.3._bn1.weight", "stem.conv1.weight"
    save_file({**classifier.state_dict(), own_name: torch.zeros(1)}, own_weights / "test_mambaout.safetensors")

    assert lite0_name in refused(as_file(LITE0, tmp_path, {**lite0_state, lite0_name: torch.zeros(1)}), tmp_path)
    assert own_name in refused(OWN, own_weights)


@pytest.mark.parametrize("suffix", ["weight", "running_mean"])
def test_a_missing_tensor_is_refused(tmp_path, lite0_state, suffix):
    left = {name: value for name, value in lite0_state.items() if name != f"_bn1.{suffix}"}
    assert len(left) == len(lite0_state) - 1

    assert "tensors, expected" in refused(as_file(LITE0, tmp_path, left), tmp_path)


def test_a_missing_or_a_foreign_mambaout_tensor_is_refused(own_weights, classifier):
    path, state = own_weights / "test_mambaout.safetensors", classifier.state_dict()
    save_file({name: value for name, value in state.items() if name != "head.norm.bias"}, path)
    missing = refused(OWN, own_weights)
    save_file({**state, "head.foreign": torch.zeros(1)}, path)
    foreign = refused(OWN, own_weights)

    assert "head.norm.bias" in missing
    assert "head.foreign" in foreign


def test_a_pickled_object_is_refused_and_not_run(tmp_path):
    ran = tmp_path / "ran"

    for content in (pickle.dumps(Payload(ran)), {"_conv_stem.weight": Payload(ran)}, torch.nn.Linear(1, 1)):
        assert "not a readable weights file" in refused(as_file(LITE0, tmp_path, content), tmp_path)
    assert not ran.exists()
    pickle.loads(pickle.dumps(Payload(ran)))
    assert ran.exists()  # it would have


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}, 3])
def test_what_is_no_dictionary_of_named_tensors_is_refused(tmp_path, content):
    assert refused(as_file(LITE0, tmp_path, content), tmp_path)


def test_weights_with_another_digest_than_the_pinned_are_never_opened(tmp_path, lite0_state):
    spec = as_file(LITE0, tmp_path, {**lite0_state, "_fc.bias": torch.ones(1000)})
    pinned = dataclasses.replace(spec, weights=dataclasses.replace(spec.weights, sha256=LITE0.weights.sha256))

    assert f"expected {LITE0.weights.sha256}" in refused(pinned, tmp_path)


def test_an_encoder_without_weights_does_not_load(tmp_path):
    with pytest.raises(MissingWeights, match=r"put test_mambaout\.safetensors"):
        load_encoder(OWN, tmp_path)
