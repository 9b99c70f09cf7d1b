# ruff: noqa: N803, N806 - the papers' letters
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from models.encoders.vmamba import NETWORKS, VSSM, adapt, build, cross_merge, cross_scan, selective_scan

# Names and shapes as the official repository saves them: (inner, rank, state), convolution kernels, gate.
OFFICIAL = {
    "vmamba_default": {
        "patch_embed.0.weight": (96, 3, 4, 4),
        "patch_embed.2.bias": (96,),
        "layers.0.blocks.1.norm.weight": (96,),
        "layers.0.blocks.1.norm2.bias": (96,),
        "layers.0.blocks.1.op.in_proj.weight": (384, 96),
        "layers.0.blocks.1.op.conv2d.weight": (192, 1, 3, 3),
        "layers.0.blocks.1.op.conv2d.bias": (192,),
        "layers.0.blocks.1.op.x_proj_weight": (4, 38, 192),
        "layers.0.blocks.1.op.dt_projs_weight": (4, 192, 6),
        "layers.0.blocks.1.op.dt_projs_bias": (4, 192),
        "layers.0.blocks.1.op.A_logs": (768, 16),
        "layers.0.blocks.1.op.Ds": (768,),
        "layers.0.blocks.1.op.out_norm.weight": (192,),
        "layers.0.blocks.1.op.out_proj.weight": (96, 192),
        "layers.0.blocks.1.mlp.fc1.weight": (384, 96),
        "layers.0.blocks.1.mlp.fc2.bias": (96,),
        "layers.0.downsample.1.weight": (192, 96, 2, 2),
        "layers.0.downsample.3.weight": (192,),
        "layers.2.blocks.8.op.A_logs": (3072, 16),
        "layers.3.blocks.1.op.x_proj_weight": (4, 80, 1536),
        "classifier.norm.weight": (768,),
    },
    "vmambav2v_tiny_224": {
        "patch_embed.0.weight": (48, 3, 3, 3),
        "patch_embed.2.weight": (48,),
        "patch_embed.5.weight": (96, 48, 3, 3),
        "patch_embed.7.bias": (96,),
        "layers.0.blocks.1.op.in_proj.weight": (96, 96),
        "layers.0.blocks.1.op.conv2d.weight": (96, 1, 3, 3),
        "layers.0.blocks.1.op.x_proj_weight": (4, 8, 96),
        "layers.0.blocks.1.op.dt_projs_weight": (4, 96, 6),
        "layers.0.blocks.1.op.A_logs": (384, 1),
        "layers.0.blocks.1.op.out_proj.weight": (96, 96),
        "layers.0.downsample.1.weight": (192, 96, 3, 3),
        "layers.2.blocks.7.op.Ds": (1536,),
        "layers.3.blocks.1.mlp.fc1.weight": (3072, 768),
        "classifier.norm.bias": (768,),
    },
}

# Tensors and parameters of the official class without its classifier.
SIZES = {"vmamba_default": (303, 42_953_376), "vmambav2v_tiny_224": (274, 29_480_064)}


@pytest.fixture(autouse=True)
def repeatable():
    torch.manual_seed(0)


def toy(network):
    """The network with its layout's design, 4 narrow blocks."""
    return VSSM(dataclasses.replace(NETWORKS[network], dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))).eval()


@pytest.mark.parametrize("network", NETWORKS)
def test_names_and_shapes_are_the_official_repositorys(network):
    with torch.device("meta"):
        state = build(network).state_dict()

    assert {name: tuple(state[name].shape) for name in OFFICIAL[network]} == OFFICIAL[network]
    assert (len(state), sum(tensor.numel() for tensor in state.values())) == SIZES[network]
    assert ("layers.0.blocks.0.op.conv2d.bias" in state) == (network == "vmamba_default")


def recurrence(u, delta, A, B, C, D):
    """The formula, position by position, in float64."""
    u, delta, A, B, C, D = (x.double() for x in (u, delta, A, B, C, D))
    h, y = torch.zeros(*u.shape[:2], *A.shape[1:], dtype=torch.float64), []  # h (B, K, D, N)
    for t in range(u.shape[2]):
        decay = torch.exp(delta[:, :, t, :, None] * A)
        h = decay * h + torch.einsum("bkd,bkn->bkdn", delta[:, :, t] * u[:, :, t], B[:, :, t])
        y.append(torch.einsum("bkdn,bkn->bkd", h, C[:, :, t]) + D * u[:, :, t])
    return torch.stack(y, dim=2)


def scan_inputs(batch, positions, channels, state):
    """Decays from next to none to complete, side by side in one sequence: delta A from -1e-6 to -1e4."""
    directions = 2
    delta = 10 ** torch.empty(batch, directions, positions, channels).uniform_(-6, 2)
    u = torch.randn(delta.shape) / delta.clamp(min=1)  # keeps delta u within sight of 1
    A = -(10 ** torch.empty(directions, channels, state).uniform_(0, 2))
    B, C = torch.randn(2, batch, directions, positions, state) / state**0.5
    return u, delta, A, B, C, torch.randn(directions, channels)


@pytest.mark.parametrize("state", [1, 16])
@pytest.mark.parametrize("positions", [1, 7, 49, 196, 200])
def test_the_scan_is_the_sequential_recurrence_at_any_decay(state, positions):
    inputs = scan_inputs(2, positions, 3, state)

    torch.testing.assert_close(selective_scan(*inputs).double(), recurrence(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("state", [1, 16])
def test_the_scan_of_a_whole_image_is_the_sequential_recurrence(state):
    u, delta, A, B, C, D = scan_inputs(1, 3136, 2, state)
    for scale in (1e-4, 1.0, 1e4):  # remembers everything, remembers some, forgets at once
        inputs = (u, (delta.log10() / 8 + 1) * scale, A, B, C / scale, D)

        torch.testing.assert_close(selective_scan(*inputs).double(), recurrence(*inputs), rtol=1e-4, atol=1e-4)


def test_the_scan_carries_the_state_over_the_whole_sequence():
    u, delta, A, B, _, D = scan_inputs(1, 3136, 1, 1)
    u = functional.one_hot(torch.tensor(0), 3136).float().view(1, 1, -1, 1).expand(u.shape)
    ones = torch.ones_like(B)

    y = selective_scan(u, torch.full_like(delta, 0.001), torch.full_like(A, -1), ones, ones, torch.zeros_like(D))

    assert y[0, 0, -1, 0].item() == pytest.approx(0.001 * math.exp(-3.135), rel=1e-4)


def test_the_scan_of_one_image_does_not_depend_on_its_batch():
    u, delta, A, B, C, D = scan_inputs(3, 3136, 32, 16)  # of the 6 sequences 5 are kept at a time

    together = selective_scan(u, delta, A, B, C, D)

    alone = [selective_scan(u[i : i + 1], delta[i : i + 1], A, B[i : i + 1], C[i : i + 1], D) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


def test_gradients_pass_through_the_scan():
    inputs = [x.double().requires_grad_() for x in scan_inputs(1, 10, 2, 3)]
    inputs[1] = torch.rand_like(inputs[1]).requires_grad_()
    expected = torch.autograd.grad(recurrence(*inputs).square().sum(), inputs)

    torch.testing.assert_close(torch.autograd.grad(selective_scan(*inputs).square().sum(), inputs), expected)


def test_the_four_directions_of_a_two_by_three_image():
    image = torch.tensor([[0, 1, 2], [3, 4, 5]]).view(1, 2, 3, 1)

    rows = cross_scan(image)[0, :, :, 0].tolist()

    assert rows == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


def test_merging_adds_the_four_directions_at_each_position():
    image = torch.randn(2, 3, 5, 4)
    weights = torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1, 1)

    torch.testing.assert_close(cross_merge(cross_scan(image) * weights, 3, 5), image * 1111)


class ChannelsFirst:
    """The official arithmetic on (B, C, H, W) maps, from the tensors by their names and nothing else."""

    def __init__(self, state):
        self.state = state

    def embed(self, images):
        if "patch_embed.5.weight" in self.state:
            x, padding = self.norm(self.conv(images, "patch_embed.0", stride=2, padding=1), "patch_embed.2"), 1
            x = self.norm(self.conv(functional.gelu(x), "patch_embed.5", stride=2, padding=1), "patch_embed.7")
        else:
            x, padding = self.norm(self.conv(images, "patch_embed.0", stride=4), "patch_embed.2"), 0
        for stage in (f"layers.{i}" for i in range(4)):
            x = self.block(x, f"{stage}.blocks.0")
            if f"{stage}.downsample.1.weight" in self.state:
                x = self.conv(x, f"{stage}.downsample.1", stride=2, padding=padding)
                x = self.norm(x, f"{stage}.downsample.3")
        return self.norm(x, "classifier.norm").mean(dim=(2, 3))

    def block(self, x, name):
        inner = self.state[f"{name}.op.out_norm.weight"].numel()
        branch = self.linear(self.norm(x, f"{name}.norm"), f"{name}.op.in_proj")
        branch, gate = branch[:, :inner], branch[:, inner:]
        branch = functional.silu(self.conv(branch, f"{name}.op.conv2d", padding=1, groups=inner))
        branch = self.norm(self.scan(branch, f"{name}.op"), f"{name}.op.out_norm")
        if gate.shape[1]:
            branch = branch * functional.silu(gate)
        x = x + self.linear(branch, f"{name}.op.out_proj")
        hidden = functional.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        return x + self.linear(hidden, f"{name}.mlp.fc2")

    def scan(self, x, name):
        """One direction after the other, each by the recurrence."""
        x_proj, dt_projs, bias, A_logs, Ds = (
            self.state[f"{name}.{kind}"].chunk(4)
            for kind in ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")
        )
        total = torch.zeros_like(x)
        for k, (by_column, backwards) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
            path = (x.mT if by_column else x).flatten(2)  # (B, D, L)
            path = path.flip(2) if backwards else path
            dt, B, C = torch.split(x_proj[k] @ path, [dt_projs[k].shape[2], *[A_logs[k].shape[1]] * 2], dim=1)
            delta = functional.softplus(dt_projs[k] @ dt + bias[k].mT)
            sequences = [each.mT[:, None] for each in (path, delta, B, C)]  # (B, 1, L, D or N)
            y = recurrence(*sequences[:2], -A_logs[k].exp()[None], *sequences[2:], Ds[k][None])[:, 0].mT.float()
            y = y.flip(2) if backwards else y
            total += y.view(x.mT.shape).mT if by_column else y.view(x.shape)
        return total

    def conv(self, x, name, **how):
        return functional.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **how)

    def linear(self, x, name):
        return functional.conv2d(x, self.state[f"{name}.weight"][:, :, None, None], self.state.get(f"{name}.bias"))

    def norm(self, x, name):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        weight, bias = (self.state[f"{name}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
        return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


@pytest.mark.parametrize("network", NETWORKS)
def test_a_toy_network_computes_the_official_arithmetic(network):
    toy_network = toy(network)
    with torch.no_grad():
        for parameter in toy_network.parameters():  # so that every one of them shows in the outcome
            parameter.add_(torch.randn(parameter.shape), alpha=0.2)
    images = torch.randn(2, 3, 64, 96)

    with torch.inference_mode():
        embeddings, expected = toy_network(images), ChannelsFirst(toy_network.state_dict()).embed(images)

    assert embeddings.shape == (2, 32)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-4)
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.01


@pytest.mark.parametrize("network", NETWORKS)
def test_official_weights_load_without_their_classifier(network):
    source, target = toy(network), toy(network)
    official = {**source.state_dict(), "classifier.head.weight": torch.zeros(1000, 32)}
    name = "layers.1.blocks.0.op.in_proj.weight"
    official[name] = official[name][:, :, None, None]  # the repository's Linear2d takes either

    target.load_state_dict(adapt(official, target), strict=True)

    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def moco_checkpoint(student):
    """What CLEAR's training saves: the projector in the classifier's place, teacher and predictor beside it."""
    projector = nn.Sequential(nn.Linear(32, 8, bias=False), nn.BatchNorm1d(8)).state_dict()
    return {
        **{f"module.base_encoder.{name}": value for name, value in student.items()},
        **{f"module.base_encoder.classifier.head.{name}": value for name, value in projector.items()},
        **{f"module.momentum_encoder.{name}": torch.zeros_like(value) for name, value in student.items()},
        "module.predictor.0.weight": torch.zeros(8, 8),
    }


def test_clears_checkpoint_loads_as_its_student():
    source, target = toy("vmamba_default"), toy("vmamba_default")

    target.load_state_dict(adapt(moco_checkpoint(source.state_dict()), target), strict=True)

    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())


def test_a_foreign_and_a_missing_tensor_do_not_load():
    network = toy("vmamba_default")
    state = network.state_dict()
    for wrong in ({**state, "pos_embed": torch.zeros(1)}, dict(list(state.items())[1:])):
        with pytest.raises(RuntimeError, match=r"pos_embed|patch_embed\.0\.weight"):
            network.load_state_dict(adapt(wrong, network), strict=True)


def test_the_two_layouts_do_not_load_each_others_weights():
    default, tiny = toy("vmamba_default"), toy("vmambav2v_tiny_224")

    with pytest.raises(RuntimeError, match=r"op\.A_logs"):
        tiny.load_state_dict(adapt(default.state_dict(), tiny), strict=True)


def test_the_first_time_steps_lie_between_a_thousandth_and_a_tenth():
    delta = functional.softplus(toy("vmamba_default").layers[0].blocks[0].op.dt_projs_bias)

    assert 0.00099 < delta.min() < 0.01 < delta.max() < 0.101
