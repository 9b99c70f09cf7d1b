"""What pretraining trains is what the encoder runs, and its map is where its embedding comes from."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from models.encoders import mambaout, vit_conv, vmamba
from models.encoders.lesion_lite import LesionLite
from models.lecl.networks import LOOKS, backbone
from models.load import load_encoder, load_network
from models.specs import Weights
from models.zoo import ENCODERS, LESION_LITE, LITE0, TEST

VIT = {"dim": 48, "depth": 2, "heads": 2, "input_size": 64}
VMAMBA = replace(vmamba.NETWORKS["vmamba_default"], depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), state=2)
WIDE, SQUARE = (64, 96), (64, 64)  # rows, columns: a map that is turned over shows on the first


def spec_of(family):
    """A small encoder of the family; all but the efficientnet's weights are a file."""
    small = {"vit_conv": ("vit_conv_small", 48, 64), "vmamba": ("vmamba_tiny", 32, 64)}
    if family in small:
        name, dim, size = small[family]
        return replace(ENCODERS[name], network="tiny", dim=dim, input_size=size)
    lesion_lite = replace(LESION_LITE, weights=Weights(source="file", locator="lesion_lite"))
    return {"efficientnet": LITE0, "mambaout": TEST, "lesion_lite": lesion_lite}[family]


def network_of(family):
    networks = {"vit_conv": vit_conv, "vmamba": vmamba, "mambaout": mambaout}
    return (
        networks[family].build(spec_of(family).network) if family in networks else LesionLite("tf_efficientnet_lite0")
    )


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A weights directory with random weights of every family; no value in them is a first one."""
    monkeypatch.setitem(vit_conv.NETWORKS, "tiny", VIT)
    monkeypatch.setitem(vmamba.NETWORKS, "tiny", VMAMBA)
    torch.manual_seed(0)
    for family in LOOKS.keys() - {"efficientnet"}:
        network = network_of(family)
        with torch.no_grad():
            for each in network.parameters():
                each.add_(0.02 * torch.rand_like(each))
            for name, each in network.named_buffers():
                if "running" in name:
                    each.add_(0.02 * torch.rand_like(each))
        save_file(network.state_dict(), tmp_path / f"{spec_of(family).name}.safetensors")
    return tmp_path


def images_for(family, count=2):
    size = SQUARE if family == "vit_conv" else WIDE
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", LOOKS)
def test_the_embedding_is_the_encoders(folder, family):
    spec, images = spec_of(family), images_for(family)

    with torch.inference_mode():
        _, embedding = backbone(spec, folder).eval()(images)
        loaded = load_encoder(spec, folder).network.cpu()
        expected = loaded(images)
        if family == "lesion_lite":  # training sees the attended half before it is weighed
            whole, attended = embedding.split([320, 256], dim=1)
            embedding = torch.cat([whole, loaded.network.say(attended) * attended], dim=1)

    assert embedding.shape == (2, spec.dim)
    torch.testing.assert_close(embedding, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "channels", "size"),
    [
        ("efficientnet", 1280, (2, 3)),
        ("mambaout", 64, (2, 3)),
        ("vit_conv", 48, (4, 4)),
        ("vmamba", 32, (2, 3)),
        ("lesion_lite", 256, (4, 6)),
    ],
)
def test_a_backbone_says_the_shapes_of_what_it_answers(folder, family, channels, size):
    online = backbone(spec_of(family), folder)

    map, embedding = online(images_for(family))

    assert (online.channels, online.dim) == (channels, spec_of(family).dim)
    assert map.shape == (2, channels, *size)
    assert embedding.shape == (2, online.dim)


@pytest.mark.parametrize("family", ["efficientnet", "mambaout", "vmamba"])
def test_the_embedding_is_the_mean_of_the_map(folder, family):
    online = backbone(spec_of(family), folder).eval()

    with torch.inference_mode():
        map, embedding = online(images_for(family))

    for cells, found in zip(map, embedding, strict=True):
        mean = sum(cells[:, row, column] for row in range(map.shape[2]) for column in range(map.shape[3]))
        mean = mean / (map.shape[2] * map.shape[3])  # (channels,)
        if family == "mambaout":
            mean = online.network.network.head.norm(mean)
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["efficientnet", "mambaout", "vmamba", "lesion_lite"])
def test_the_maps_cells_lie_where_their_pixels_do(folder, family):
    """A spot in the lower left corner moves the cells there more than any others."""
    online, images = backbone(spec_of(family), folder).eval(), torch.full((1, 1, 192, 256), 0.5)
    spot = images.clone()
    spot[..., 170:, :22] = torch.rand(22, 22, generator=torch.Generator().manual_seed(0))

    with torch.inference_mode():
        moved = (online(spot)[0] - online(images)[0]).norm(dim=1)[0]  # (h, w)

    row, column = divmod(int(moved.argmax()), moved.shape[1])
    assert row >= 0.7 * moved.shape[0] and column < 0.3 * moved.shape[1]


def test_a_vits_map_holds_its_tokens_row_by_row(folder):
    online, images = backbone(spec_of("vit_conv"), folder).eval(), images_for("vit_conv")
    spec = spec_of("vit_conv")
    normalised = (images - torch.tensor(spec.mean).view(3, 1, 1)) / torch.tensor(spec.std).view(3, 1, 1)

    with torch.inference_mode():
        map, embedding = online(images)
        tokens = online.network.forward_features(normalised)  # (2, 1 + 16, 48)

    torch.testing.assert_close(embedding, tokens[:, 0], rtol=1e-5, atol=1e-5)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(map[:, :, row, column], tokens[:, 1 + 4 * row + column], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", LOOKS)
def test_all_is_trained_but_a_vits_positions_and_the_trunk_that_sees_the_whole_slice(folder, family):
    online = backbone(spec_of(family), folder)

    assert online.training
    names = {name for name, _ in online.network.named_parameters()}
    still = {name for name, each in online.network.named_parameters() if not each.requires_grad}
    if family == "vit_conv":
        assert still == {"pos_embed"}
    elif family == "lesion_lite":
        assert still == {name for name in names if name.startswith("whole.")} and still < names
    else:
        assert still == set()


def test_weights_are_the_encoders_to_the_bit_and_only_where_they_are_asked_for(folder):
    expected = load_network(LITE0, folder).state_dict()

    trained, fresh = backbone(LITE0, folder).network.state_dict(), backbone(LITE0, None).network.state_dict()

    assert all(torch.equal(trained[name], value) for name, value in expected.items())
    assert not torch.equal(fresh["conv_stem.weight"], expected["conv_stem.weight"])
