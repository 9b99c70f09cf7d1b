"""LesionLite: what its embedding is made of, and that evidence learns where a lesion is."""

import math

import pytest
import torch

from models.encoders.lesion_lite import LesionLite
from models.encoders.timm_import import timm
from models.lecl.config import Config
from models.lecl.objectives import pretraining
from models.lecl.views import Batch
from models.load import load_network
from models.zoo import LITE0

TRUNK, SIZE, CELL = "tf_efficientnet_lite0", 64, 16  # px


@pytest.fixture
def network():
    """Untrained, with evidence that differs between cells."""
    torch.manual_seed(0)
    network = LesionLite(TRUNK).eval()
    with torch.no_grad():
        network.evidence.weight.normal_(0, 3)
    return network


def pictures(count, rows=SIZE, columns=96):
    return 2 * torch.rand(count, 3, rows, columns, generator=torch.Generator().manual_seed(1)) - 1


def trunk_maps(network, images):
    """timm's own maps of the trunk at a sixteenth and at a thirty-second of the input's side."""
    trunk = timm.create_model(TRUNK, features_only=True).eval()
    trunk.conv_stem.load_state_dict(network.stem[0].state_dict())
    trunk.bn1.load_state_dict(network.stem[1].state_dict())
    trunk.blocks.load_state_dict(network.blocks.state_dict())
    *_, fine, coarse = trunk(images)
    return fine, coarse


@torch.inference_mode()
def test_the_embedding_is_the_whole_slices_mean_beside_the_cells_weighed_by_their_evidence(network):
    images = pictures(2)
    cells, embedding = network.map_and_embedding(images)  # (2, 256, 4, 6)
    quarters = [images[..., down::2, along::2] for down in (0, 1) for along in (0, 1)]
    _, small = trunk_maps(network.whole, sum(quarters) / 4)  # (2, 320, 1, 2)

    places = [(row, column) for row in range(4) for column in range(6)]
    weight, bias = network.evidence.weight[0, :, 0, 0], network.evidence.bias[0]
    for slice in range(2):
        raised = [math.exp(float((cells[slice, :, row, column] * weight).sum() + bias)) for row, column in places]
        shares = [each / sum(raised) for each in raised]
        attended = sum(
            share * cells[slice, :, row, column] for share, (row, column) in zip(shares, places, strict=True)
        )
        mean = sum(small[slice, :, row, column].clamp(min=0) for row in range(1) for column in range(2)) / 2
        torch.testing.assert_close(embedding[slice], torch.cat([mean, attended]), rtol=1e-4, atol=1e-5)
        assert max(shares) > 2 / len(shares)  # an even mean would not do


@torch.inference_mode()
def test_the_attended_half_counts_as_much_as_a_lesion_is_likely_where_it_looked(network):
    images = pictures(2)
    _, plain = network.map_and_embedding(images)

    embedding = network(images)

    assert torch.equal(embedding[:, :320], plain[:, :320])
    weight, bias = network.evidence.weight[0, :, 0, 0], network.evidence.bias[0]
    for slice in range(2):
        likely = 1 / (1 + math.exp(-float((plain[slice, 320:] * weight).sum() + bias)))
        expected = 0.5 * (0.25 + 0.75 * likely) * plain[slice, 320:]
        torch.testing.assert_close(embedding[slice, 320:], expected, rtol=1e-4, atol=1e-6)


@torch.inference_mode()
def test_a_cell_sees_its_own_fine_features_and_the_coarse_ones_above_it(network):
    images = pictures(1)
    fine, coarse = trunk_maps(network, images)
    seen = []
    network.mixed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    network(images)

    for row in range(4):
        for column in range(6):
            own = network.fine.weight[:, :, 0, 0] @ fine[0, :, row, column] + network.fine.bias
            above = network.coarse.weight[:, :, 0, 0] @ coarse[0, :, row // 2, column // 2] + network.coarse.bias
            torch.testing.assert_close(seen[0][0, :, row, column], (own + above).relu(), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_an_embedding_does_not_depend_on_what_shares_its_batch(network):
    images = pictures(5)

    together, alone = network(images), torch.cat([network(each[None]) for each in images])

    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def blobs(count):
    """Noise with one bright disc in a slice, in the middle of a cell; and which cell."""
    random = torch.Generator().manual_seed(2)
    view, mask = 0.3 + 0.2 * torch.rand(count, 1, SIZE, SIZE, generator=random), torch.zeros(count, 1, SIZE, SIZE)
    cells = torch.randperm((SIZE // CELL) ** 2, generator=random)[:count]
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    for lesion, cell in zip(mask, cells.tolist(), strict=True):
        row, column = (CELL * place + CELL / 2 for place in divmod(cell, SIZE // CELL))
        lesion[0, (rows - row) ** 2 + (columns - column) ** 2 < 5**2] = 1
    planted = torch.maximum(view, mask)
    return Batch(
        view=planted, healthy=view, mask=mask, other=planted, lesion=torch.ones(count, dtype=torch.bool)
    ), cells


def test_planting_teaches_where_a_bright_spot_is(tmp_path):
    """On a trunk that stays as ImageNet left it."""
    torch.manual_seed(0)
    config = Config.model_validate(
        {
            "data": {"sources": [{"kind": "archive", "path": "ct"}]},
            "encoder": {"base": "lesion_lite", "start": "trunk", "frozen_blocks": 7, "frozen_norms": True},
            "objectives": {"planting": 1},
            "run": {"output": "out", "steps": 1},
        }
    )
    module, (batch, cells) = pretraining(config, tmp_path).train(), blobs(8)
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=3e-3)

    for _ in range(30):
        module(batch)["planting"].backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.inference_mode():
        map, _ = module.backbone(batch.view)
        evidence = module.backbone.network.evidence(map).flatten(1)  # (8, 16)
    assert evidence.argmax(dim=1).tolist() == cells.tolist()
    assert (evidence.amax(dim=1) > 0).all()


def test_training_leaves_the_first_look_as_imagenet_taught_it(tmp_path):
    trunk = load_network(LITE0, tmp_path)
    network = LesionLite(TRUNK)
    network.take_trunk(trunk)

    network.train()

    taught = trunk.blocks.state_dict()
    assert all(torch.equal(each, taught[name]) for name, each in network.whole.blocks.state_dict().items())
    assert not any(each.training for each in network.whole.modules())
    assert not any(each.requires_grad for each in network.whole.parameters())
    assert all(torch.equal(each, taught[name]) for name, each in network.blocks.state_dict().items())
    assert all(each.requires_grad for each in network.blocks.parameters())
