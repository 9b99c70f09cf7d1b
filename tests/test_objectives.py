"""What a pretraining step computes, what it leaves as it was, and which runs cannot be."""

import copy
import math
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing, nn

from models.lecl.clock import Clock
from models.lecl.config import BadConfig, Config, read_config
from models.lecl.objectives import pretraining
from models.lecl.planting import LINE, planting_loss
from models.lecl.radlas import discrimination_loss, grounding, reconstruction_loss
from models.lecl.ranks import Rank, joined
from models.lecl.stop import Stop
from models.lecl.train import run
from models.lecl.training import Training
from models.lecl.views import Sample, collate
from models.load import load_network
from models.zoo import LITE0

CONFIGS = Path(__file__).resolve().parent.parent / "models/lecl/configs"
SIZE = 64  # px
ALL = {"moco": 1.0, "lecl": 0.5, "reconstruction": 1.0, "discrimination": 0.5, "planting": 2.0}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(objectives, base="test_mambaout", output="out", views=None, run_keys=None, **encoder):
    return Config.model_validate(
        {
            "data": {"sources": [{"kind": "archive", "path": "ct"}]},
            "encoder": {"base": base, "start": "random", **encoder},
            "views": {"size": SIZE, **(views or {})},
            "objectives": {"projector_hidden": 16, **objectives},
            "run": {"output": output, "steps": 4, "batch": 4, "learning_rate": 1e-3, "workers": 0, **(run_keys or {})},
        }
    )


@dataclass
class Spots(torch.utils.data.Dataset):
    """Slices of noise, every second with a bright square for a lesion."""

    slices: int = 8

    def __len__(self):
        return self.slices

    def __getitem__(self, key):
        index, draw = key
        random = np.random.default_rng([index, draw])
        healthy, other = random.random((2, SIZE, SIZE), np.float32)
        mask = np.zeros_like(healthy)
        if index % 2:
            row, column = random.integers(0, SIZE - 16, 2)
            mask[row : row + 16, column : column + 16] = 1
        return Sample(np.maximum(healthy, mask), healthy, mask, other, bool(index % 2))


@pytest.fixture
def batch():
    return collate([Spots()[index, 0] for index in range(4)])


def module_for(objectives, **keys):
    torch.manual_seed(0)
    return pretraining(config(objectives, **keys), Path("nowhere"))


@pytest.mark.parametrize(
    ("asked", "parts"),
    [
        (["planting"], {"planting"}),
        (["moco"], {"contrast"}),
        (["lecl", "planting"], {"contrast", "planting"}),
        (["reconstruction"], {"restorer"}),
        (["reconstruction", "discrimination"], {"restorer", "projections"}),
        (list(ALL), {"contrast", "restorer", "projections", "planting"}),
    ],
)
def test_only_what_has_a_weight_is_computed(batch, asked, parts):
    module = module_for({name: ALL[name] for name in asked})

    losses = module(batch)

    assert list(losses) == asked
    assert {name for name, _ in module.named_children()} == {"backbone", *parts}
    assert all(loss.ndim == 0 and loss.isfinite() and loss.requires_grad for loss in losses.values())


def test_each_loss_is_of_its_own_pictures_and_unweighted(batch):
    module = module_for(ALL | {"lecl_lambda": 3.0, "temperature": 0.3}).eval()

    losses = module(batch)

    map, embedding = module.backbone(batch.view)
    restored = module.restorer(map, SIZE)
    evidence = grounding(batch.view, restored)
    contrast = [module.contrast(embedding, batch.view, batch.other, batch.lesion, weight) for weight in (0.0, 3.0)]
    line = nn.functional.binary_cross_entropy_with_logits(
        module.planting.slice(embedding).squeeze(1), batch.lesion.float()
    )
    expected = {
        "moco": contrast[0],
        "lecl": contrast[1],
        "reconstruction": reconstruction_loss(restored, batch.healthy, batch.mask),
        "discrimination": discrimination_loss(map, evidence, embedding, batch.lesion, 0.3, module.projections),
        "planting": planting_loss(module.planting.evidence(map), batch.mask, batch.lesion) + LINE * line,
    }
    assert module.contrast.temperature == 0.3
    assert losses["lecl"] > losses["moco"]
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])


def test_the_view_goes_through_the_backbone_once_for_all_objectives(batch):
    module, seen = module_for(ALL | {"moco": 0.0}), []
    module.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    module(batch)

    assert [images is batch.view for images in seen] == [True, False]
    assert seen[1] is batch.other


def test_without_contrast_nobody_looks_at_the_second_view(batch):
    module = module_for({"planting": 1.0, "reconstruction": 1.0, "discrimination": 1.0}).eval()
    blank = replace(batch, other=torch.full_like(batch.other, math.nan))

    assert not module.contrasts
    assert module(blank) == module(batch)


def trained(module, configuration, steps=2):
    """`module` after so many steps of the real training, on the CPU whatever there is."""
    training = Training(configuration, module, len(Spots()), Rank())
    batches = iter(collate([Spots()[(4 * step + index) % 8, step] for index in range(4)]) for step in range(steps))
    for _ in range(steps):
        training.step(batches, Clock(torch.device("cpu")))
    return module


def norm_statistics(backbone):
    return {name: each.clone() for name, each in backbone.named_buffers() if "running" in name}


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norms_keep_their_statistics_to_the_bit_in_both_encoders(tmp_path, frozen):
    asked = config({"moco": 1.0, "planting": 1.0}, base="efficientnet_lite0", start="pretrained", frozen_norms=frozen)
    module = pretraining(asked, tmp_path)
    before = norm_statistics(module.backbone)

    trained(module, asked)

    assert len(before) == 2 * 49  # of the norms of an EfficientNet-Lite0
    for encoder in (module.backbone, module.contrast.momentum_backbone):
        after = norm_statistics(encoder)
        assert {torch.equal(after[name], value) for name, value in before.items()} == {frozen}


def test_a_norm_of_several_gpus_is_frozen_too():
    module = module_for({"moco": 1.0}, base="efficientnet_lite0", frozen_norms=True)

    module = nn.SyncBatchNorm.convert_sync_batchnorm(module).train()

    norms = [each for each in module.modules() if isinstance(each, nn.SyncBatchNorm)]
    assert len(norms) > 2 * 49
    # Those of the projector, the predictor and the momentum projector.
    assert [each.training for each in norms].count(True) == 3 + 2 + 3


@pytest.mark.parametrize(("base", "start"), [("efficientnet_lite0", "pretrained"), ("lesion_lite", "trunk")])
def test_frozen_blocks_stay_as_they_are_and_the_others_learn(tmp_path, base, start):
    asked = config({"planting": 1.0}, base=base, start=start, frozen_blocks=2)
    module = pretraining(asked, tmp_path)
    network = module.backbone.network
    before = copy.deepcopy(network.state_dict())
    stems = ("stem.",) if base == "lesion_lite" else ("conv_stem.", "bn1.")
    still = (*stems, "blocks.0.", "blocks.1.", "whole.")  # the first look is never trained

    trained(module, asked)

    after = network.state_dict()
    assert {name for name, each in network.named_parameters() if not each.requires_grad} == {
        name for name, _ in network.named_parameters() if name.startswith(still)
    }
    assert all(each.grad is None for name, each in network.named_parameters() if name.startswith(still))
    assert all(torch.equal(after[name], value) for name, value in before.items() if name.startswith(still))
    changed = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert {name.split(".")[1] for name in changed if name.startswith("blocks.")} == set("23456")


def test_a_start_from_the_trunk_has_imagenets_weights_there_and_none_beyond(tmp_path):
    trunk = load_network(LITE0, tmp_path)
    networks = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        networks.append(
            pretraining(config({"planting": 1.0}, base="lesion_lite", start="trunk"), tmp_path).backbone.network
        )

    for network in networks:
        pairs = (network.stem[0], trunk.conv_stem), (network.stem[1], trunk.bn1), (network.blocks, trunk.blocks)
        for ours, theirs in pairs:
            state = theirs.state_dict()
            assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    assert not torch.equal(networks[0].fine.weight, networks[1].fine.weight)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"base": "biomedclip"}, "encoder.base: biomedclip is a biomedclip, expected one of efficientnet, mambaout,"),
        ({"base": "merlin"}, "encoder.base: merlin is a i3resnet"),
        ({"start": "trunk"}, 'encoder.start: "trunk", but test_mambaout has none'),
        ({"base": "efficientnet_lite0", "start": "trunk"}, "efficientnet_lite0 has none"),
        ({"frozen_blocks": 1}, "encoder.frozen_blocks: 1, but test_mambaout has no blocks to freeze"),
        ({"base": "efficientnet_lite0", "frozen_blocks": 8}, "8, but efficientnet_lite0 has 7 blocks to freeze"),
        ({"base": "lesion_lite", "frozen_blocks": 8}, "8, but lesion_lite has 7 blocks to freeze"),
        ({"base": "vit_conv_small", "views": {"size": 224}, "frozen_blocks": 1}, "vit_conv_small has no blocks"),
        ({"base": "vit_conv_small"}, "views: 64 px, but vit_conv_small takes 224 px alone"),
        ({"base": "vit_conv_small", "views": {"size": 224, "crop": 192}}, "views: 192 px"),
        ({"objectives": {"discrimination": 1.0}}, "objectives.discrimination: no weight for reconstruction"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_starts(tmp_path, keys, said):
    with pytest.raises(BadConfig, match=said):
        pretraining(config(**{"objectives": {"planting": 1.0}, **keys}), tmp_path)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_can_be_read_and_the_small_ones_begin(tmp_path, path):
    found = read_config(path)

    if found.run.batch <= 32:
        module = pretraining(found, tmp_path)
        assert module.contrasts == bool({"moco", "lecl"} & found.objectives.weights.keys())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("progress", [0.0, 0.25, 1.0])
def test_the_momentum_encoder_follows_by_equation_3(schedule, progress):
    module = module_for({"moco": 1.0, "momentum": 0.9, "momentum_schedule": schedule})
    with torch.no_grad():
        for each in module.backbone.parameters():
            each.add_(torch.randn_like(each))
    online = list(module.backbone.parameters())
    slow = [each.clone() for each in module.contrast.momentum_backbone.parameters()]

    module.after_step(progress)

    m = 0.9 if schedule == "constant" else 1 - 0.1 * (math.cos(math.pi * progress) + 1) / 2
    for before, theta_q, after in zip(slow, online, module.contrast.momentum_backbone.parameters(), strict=True):
        torch.testing.assert_close(after, m * before + (1 - m) * theta_q)


def in_process(number, port, folder):
    """What torchrun would start as one of two."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(number), "WORLD_SIZE": "2"}
    asked = config(ALL | {"moco": 0.0}, output=folder, run_keys={"batch": 8, "accumulate": 2, "steps": 3})
    with joined() as rank:
        torch.manual_seed(0)
        module = pretraining(asked, folder)
        start = copy.deepcopy(module.state_dict())
        result = run(asked, module, Spots(), collate, rank, Stop())
        torch.save((start, module.state_dict(), result.losses), folder / f"rank-{number}.pt")


def test_two_processes_train_the_same_weights(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    multiprocessing.spawn(in_process, (port, tmp_path), nprocs=2)

    (start, first, losses), (_, second, _) = (torch.load(tmp_path / f"rank-{number}.pt") for number in range(2))
    assert all(math.isfinite(loss) for loss in losses.values())
    learned = [name for name in first if "running" not in name]  # each process has its own statistics
    assert all(torch.equal(first[name], second[name]) for name in learned)
    for head in ("backbone", "contrast.predictor", "contrast.momentum_backbone", "restorer", "projections", "planting"):
        assert any(not torch.equal(first[name], start[name]) for name in learned if name.startswith(head)), head
