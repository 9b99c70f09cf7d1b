"""MoCo-v3: what is compared with what, what moves the momentum branch, and what is frozen."""

import copy

import pytest
import torch
from test_lecl_losses import looped
from torch import Tensor, nn

from models.encoders import vit_conv
from models.encoders.timm_import import timm
from models.lecl.moco import MoCo, freeze_patch_stem, momentum_at

SIZE = 8  # pixels


class TinyBackbone(nn.Module):
    dim = channels = 6

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, self.channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(self.channels)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        map = self.norm(self.conv(images)).relu()  # (B, 6, h, w)
        return map, map.mean(dim=(2, 3))


@pytest.fixture
def moco() -> MoCo:
    torch.manual_seed(0)
    return MoCo(TinyBackbone(), temperature=0.2, hidden=16, out=4)


def slices(batch: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """view, other (batch, 1, SIZE, SIZE), every second slice with a lesion."""
    random = torch.Generator().manual_seed(1)
    view, other = (torch.rand(batch, 1, SIZE, SIZE, generator=random) for _ in range(2))
    return view, other, torch.arange(batch) % 2 == 0


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_loss_is_the_sum_of_both_directions(moco: MoCo, weight: float) -> None:
    view, other, lesion = slices()
    apart = copy.deepcopy(moco)
    q1, q2 = (apart.predictor(apart.projector(apart.online(images)[1])) for images in (view, other))
    k1, k2 = (apart.momentum_projector(apart.momentum_backbone(images)[1]) for images in (view, other))

    loss = moco(moco.online(view)[1], view, other, lesion, weight)

    expected = looped(q1, k2, lesion, 0.2, weight) + looped(q2, k1, lesion, 0.2, weight)
    torch.testing.assert_close(loss, expected)


def test_the_view_goes_through_the_online_backbone_once(moco: MoCo) -> None:
    view, other, lesion = slices()
    seen: list[Tensor] = []
    moco.online.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))

    moco(moco.online(view)[1], view, other, lesion, 0.0)

    assert [images is view for images in seen] == [True, False]
    assert seen[1] is other


def test_gradients_reach_the_online_branch_alone(moco: MoCo) -> None:
    view, other, lesion = slices()

    moco(moco.online(view)[1], view, other, lesion, 3.0).backward()

    without = {name for name, parameter in moco.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in moco.named_parameters() if name.startswith("momentum_")}
    assert not moco.key(view.requires_grad_()).requires_grad


def test_an_update_moves_every_momentum_parameter_by_equation_3(moco: MoCo) -> None:
    with torch.no_grad():
        for parameter in [*moco.online.parameters(), *moco.projector.parameters()]:
            parameter.add_(torch.randn_like(parameter))
    before = copy.deepcopy(moco)

    moco.update(0.9)

    for slow, theta_k, theta_q in [
        (moco.momentum_backbone, before.momentum_backbone, before.online),
        (moco.momentum_projector, before.momentum_projector, before.projector),
    ]:
        for found, k, q in zip(slow.parameters(), theta_k.parameters(), theta_q.parameters(), strict=True):
            torch.testing.assert_close(found, 0.9 * k + 0.1 * q)
    for found, same in zip(moco.online.parameters(), before.online.parameters(), strict=True):
        assert torch.equal(found, same)


def test_the_momentum_branchs_norms_keep_statistics_of_their_own_batches(moco: MoCo) -> None:
    view, other, lesion = slices()
    with torch.no_grad():
        moco.online.norm.running_mean.fill_(100.0)

    moco.update(0.0)
    moco(moco.online(view)[1], view, other, lesion, 0.0)

    statistics = nn.BatchNorm2d(6)
    for images in (view, other):
        statistics(moco.momentum_backbone.conv(images))
    torch.testing.assert_close(moco.momentum_backbone.norm.running_mean, statistics.running_mean)


def test_projector_and_predictor_are_moco_v3s() -> None:
    moco = MoCo(TinyBackbone(), temperature=0.2)

    shapes = {
        name: [(layer.in_features, layer.out_features) for layer in branch if isinstance(layer, nn.Linear)]
        for name, branch in [("projector", moco.projector), ("predictor", moco.predictor)]
    }
    assert shapes == {"projector": [(6, 4096), (4096, 4096), (4096, 256)], "predictor": [(256, 4096), (4096, 256)]}
    for branch in (moco.projector, moco.predictor):
        assert [type(layer) for layer in branch[:3]] == [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        assert isinstance(branch[-1], nn.BatchNorm1d) and not branch[-1].affine


def test_training_brings_the_two_views_of_a_slice_together() -> None:
    torch.manual_seed(0)
    moco = MoCo(TinyBackbone(), temperature=0.2, hidden=32, out=8)
    view = torch.rand(16, 1, SIZE, SIZE)
    other, lesion = (view + 0.05 * torch.randn_like(view)), torch.zeros(16, dtype=torch.bool)
    optimiser = torch.optim.Adam([p for p in moco.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(40):
        loss = moco(moco.online(view)[1], view, other, lesion, 0.0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        moco.update(momentum_at(step / 40))
        losses.append(loss.item())

    assert losses[-1] < losses[0] / 2


def test_momentum_rises_from_its_start_to_one_along_half_a_cosine() -> None:
    assert [momentum_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.99, 0.995, 1.0])
    assert momentum_at(1 / 3, start=0.9) == pytest.approx(0.925)  # cos 60 degrees is a half


def test_a_plain_patch_projection_is_frozen_and_nothing_else() -> None:
    vit = timm.models.VisionTransformer(img_size=32, embed_dim=12, depth=1, num_heads=2, num_classes=0)

    assert freeze_patch_stem(nn.Sequential(vit))

    frozen = {name for name, parameter in vit.named_parameters() if not parameter.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_a_convolutional_stem_stays_trained_as_in_moco_v3() -> None:
    vit = vit_conv.ViTConv(dim=48, depth=1, heads=2, input_size=32)

    assert not freeze_patch_stem(vit)

    assert all(parameter.requires_grad for parameter in vit.patch_embed.parameters())
    assert not freeze_patch_stem(TinyBackbone())
