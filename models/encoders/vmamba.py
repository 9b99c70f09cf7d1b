"""VMamba (Liu et al. 2024, arXiv:2401.10166): a selective scan over the image along four directions.

Names and shapes of the tensors are those of the official repository (MzeroMiko/VMamba), whose
channels-first layers (LayerNorm2d, Linear2d) hold the same tensors as the channels-last ones here.
"""
# ruff: noqa: N803, N806 - A, B, C and D are the papers' letters

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.checkpoints import moco_encoder
from models.encoders.timm_import import timm

# The ImageNet classifier, or the projector that CLEAR trains in its place.
HEAD = "classifier.head."

K = 4  # directions of the cross scan

# Floats of decay factors that the scan keeps at a time (32 MB); a single longer sequence goes alone.
KEPT_DECAYS = 2**23


@dataclass(frozen=True)
class Layout:
    """Where the two published designs differ."""

    depths: tuple[int, ...]
    state: int  # N, the scan's state per channel
    expand: float  # channels inside the scan per channel outside
    gated: bool
    conv_bias: bool
    overlapping: bool  # the stem and the downsamplings use 3 x 3 convolutions instead of disjoint patches
    dims: tuple[int, ...] = (96, 192, 384, 768)
    drop_path: float = 0.1


NETWORKS = {
    # The official class's defaults, which CLEAR's code builds. Their forward_type "v2" trips an assertion
    # of the current revision, which has lost that kernel; the arithmetic is the plain cross scan.
    "vmamba_default": Layout(depths=(2, 2, 9, 2), state=16, expand=2.0, gated=True, conv_bias=True, overlapping=False),
    # VMamba-T [s1l8], ImageNet 82.6.
    "vmambav2v_tiny_224": Layout(
        depths=(2, 2, 8, 2), state=1, expand=1.0, gated=False, conv_bias=False, overlapping=True, drop_path=0.2
    ),
}


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 3, H, W) -> (B, 768), the input of the official classifier."""
    return VSSM(NETWORKS[network])


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The official checkpoint's tensors, or those of CLEAR's student; a Linear may come as a 1 x 1 convolution."""
    return {
        name: value.flatten(1) if value.shape[2:] == (1, 1) else value
        for name, value in moco_encoder(state).items()
        if not name.startswith(HEAD)
    }


class VSSM(nn.Module):
    def __init__(self, layout: Layout) -> None:
        super().__init__()
        dims, depths = layout.dims, layout.depths
        self.patch_embed = _overlapping_stem(dims[0]) if layout.overlapping else _patch_stem(dims[0])
        # The deeper a block, the likelier it is left out in training.
        drop_paths = iter(torch.linspace(0, layout.drop_path, sum(depths), device="cpu").tolist())
        stages = [
            nn.Sequential(
                OrderedDict(blocks=nn.Sequential(*(VSSBlock(dim, layout, next(drop_paths)) for _ in range(n))))
            )
            for dim, n in zip(dims, depths, strict=True)
        ]
        for stage, (dim, out) in zip(stages, pairwise(dims), strict=False):  # none after the last stage
            stage.add_module("downsample", _downsample(dim, out, layout.overlapping))
        self.layers = nn.Sequential(*stages)
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(dims[-1])})
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, dim)."""
        return self.map_and_embedding(images)[1]

    def map_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) -> the normalised last map (B, dim, H/32, W/32), its mean (B, dim)."""
        patches = self.patch_embed(images)  # (B, H/4, W/4, dims[0])
        last_map = self.classifier["norm"](self.layers(patches))  # (B, H/32, W/32, dims[-1])
        return last_map.permute(0, 3, 1, 2), last_map.mean(dim=(1, 2))


class VSSBlock(nn.Module):
    """x + SS2D(norm(x)), then x + MLP(norm(x)); dimensions are (B, H, W, dim) throughout."""

    def __init__(self, dim: int, layout: Layout, drop_path: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = SS2D(dim, layout)
        self.drop_path = timm.layers.drop.DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.op(self.norm(x)))
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return x


class SS2D(nn.Module):
    """The 2D selective scan (Sec. 4.2): every position gathers the image along K directions."""

    def __init__(self, dim: int, layout: Layout) -> None:
        super().__init__()
        inner, rank = int(layout.expand * dim), math.ceil(dim / 16)
        self.gated, self.sizes = layout.gated, [rank, layout.state, layout.state]
        self.in_proj = nn.Linear(dim, inner * (1 + layout.gated), bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=layout.conv_bias)
        self.x_proj_weight = nn.Parameter(_uniform(K, sum(self.sizes), inner, bound=inner**-0.5))
        self.dt_projs_weight = nn.Parameter(_uniform(K, inner, rank, bound=rank**-0.5))
        self.dt_projs_bias = nn.Parameter(_inverse_softplus(_log_uniform(K, inner, low=0.001, high=0.1)))
        self.A_logs = nn.Parameter(torch.arange(1.0, layout.state + 1).log().repeat(K * inner, 1))  # S4D-real
        self.Ds = nn.Parameter(torch.ones(K * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, W, dim) -> (B, H, W, dim)."""
        H, W = x.shape[1:3]
        x, *gate = self.in_proj(x).chunk(1 + self.gated, dim=-1)  # (B, H, W, inner) each
        x = functional.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        u = cross_scan(x)  # (B, K, L, inner)
        dt, B, C = torch.split(u @ self.x_proj_weight.mT, self.sizes, dim=-1)  # (B, K, L, rank), twice (B, K, L, N)
        delta = functional.softplus(dt @ self.dt_projs_weight.mT + self.dt_projs_bias[:, None])  # (B, K, L, inner)
        A = -self.A_logs.exp().view(K, -1, self.sizes[-1])  # (K, inner, N)
        D = self.Ds.view(K, -1)  # (K, inner)
        y = self.out_norm(cross_merge(selective_scan(u, delta, A, B, C, D), H, W))  # (B, H, W, inner)
        out: Tensor = self.out_proj(y * functional.silu(gate[0]) if gate else y)
        return out


def cross_scan(x: Tensor) -> Tensor:
    """x (B, H, W, D) -> (B, 4, L, D): row by row, column by column, and both backwards."""
    forwards = torch.stack([x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)], dim=1)  # (B, 2, L, D)
    return torch.cat([forwards, forwards.flip(2)], dim=1)


def cross_merge(y: Tensor, H: int, W: int) -> Tensor:
    """y (B, 4, L, D) in the orders of cross_scan -> (B, H, W, D), the sum at every position."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(2)).unbind(1)  # (B, L, D) each
    return torch.unflatten(rows, 1, (H, W)) + torch.unflatten(columns, 1, (W, H)).transpose(1, 2)


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t and y_t = C_t h_t + D u_t (Gu and Dao 2023, Eq. 2 and 4).

    u and delta (B, K, L, D), A (K, D, N), B and C (B, K, L, N), D (K, D) -> (B, K, L, D), each of the K
    directions for itself. On CUDA this is mamba-ssm's kernel, a path that has not been run yet.
    """
    scan = _kernel_scan if u.is_cuda else _grouped_scan
    return torch.addcmul(scan(u, delta, A, B, C), D[:, None], u)


def _kernel_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import (  # type: ignore[import-not-found]  # exists for CUDA only
        selective_scan_fn,
    )

    u, delta = (x.transpose(2, 3).flatten(1, 2) for x in (u, delta))  # (B, K * D, L)
    B, C = (x.transpose(2, 3).contiguous() for x in (B, C))  # (B, K, N, L)
    y: Tensor = selective_scan_fn(u, delta, A.flatten(0, 1), B, C)  # (B, K * D, L)
    return torch.unflatten(y, 1, A.shape[:2]).transpose(2, 3)


def _grouped_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As many sequences at a time as KEPT_DECAYS allows, so that memory does not grow with the batch."""
    batch, _, L, D = u.shape
    group = max(1, KEPT_DECAYS // (L * D * A.shape[-1]))
    A = A.mT.expand(batch, -1, -1, -1)  # (B, K, N, D)
    groups = zip(*(torch.split(x.flatten(0, 1), group) for x in (u, delta, A, B, C)), strict=True)
    return torch.cat([_chunked_scan(*each) for each in groups]).view(u.shape)


def _chunked_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """u and delta (S, L, D), A (S, N, D), B and C (S, L, N) -> y (S, L, D), in about 3 sqrt(L) steps.

    The sequence is cut into M = sqrt(L) chunks, whose first positions are stepped at once, then their second
    ones, and so on; that takes the states with which the chunks are entered, and so a pass before it.
    Every decay is the exp of something negative and only ever multiplied, so this is the sequential
    recurrence at any delta. Inputs divided by their cumulative decay and summed overflow, or are wrong where
    that is clamped; doubling (Hillis and Steele 1986) is as exact, but passes over the state more often.
    """
    L = u.shape[1]
    steps = math.ceil(L**0.5)
    padding = (0, 0, 0, -L % steps)  # delta 0 neither decays nor adds
    u, delta, B, C = (torch.unflatten(functional.pad(x, padding), 1, (-1, steps)) for x in (delta * u, delta, B, C))
    A = A[:, None] / math.log(2)  # exp(x) as exp2(x / ln 2): torch's exp2 takes 0.4 of the time of its exp on a CPU
    decays = [(delta[:, :, t, None] * A).exp2() for t in range(steps)]  # (S, M, N, D)
    h = _entering_states(u, delta, A, B, decays)  # (S, M, N, D)
    y = []
    for t, decay in enumerate(decays):
        h = torch.addcmul(u[:, :, t, None] * B[:, :, t, :, None], decay, h)
        Ct = C[:, :, t, None]  # (S, M, 1, N)
        y.append((Ct * h if Ct.shape[-1] == 1 else Ct @ h)[:, :, 0])  # (S, M, D)
    return torch.stack(y, dim=2).flatten(1, 2)[:, :L]


def _entering_states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, decays: list[Tensor]) -> Tensor:
    """The state before the first position of every chunk, (S, M, N, D)."""
    h = torch.zeros_like(decays[0])
    for t, decay in enumerate(decays):
        h = torch.addcmul(u[:, :, t, None] * B[:, :, t, :, None], decay, h)
    chunk_decay = (delta.sum(2)[:, :, None] * A).exp2()  # (S, M, N, D)
    states = [torch.zeros_like(h[:, 0])]  # (S, N, D)
    for left, decay in zip(h.unbind(1)[:-1], chunk_decay.unbind(1)[:-1], strict=True):
        states.append(torch.addcmul(left, decay, states[-1]))
    return torch.stack(states, dim=1)


def _patch_stem(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, dim, 4, stride=4), ChannelsLast(), nn.LayerNorm(dim))


def _overlapping_stem(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, dim // 2, 3, stride=2, padding=1),
        ChannelsLast(),
        nn.LayerNorm(dim // 2),
        ChannelsFirst(),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1),
        ChannelsLast(),
        nn.LayerNorm(dim),
    )


def _downsample(dim: int, out: int, overlapping: bool) -> nn.Sequential:
    conv = nn.Conv2d(dim, out, 3, stride=2, padding=1) if overlapping else nn.Conv2d(dim, out, 2, stride=2)
    return nn.Sequential(ChannelsFirst(), conv, ChannelsLast(), nn.LayerNorm(out))


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)  # (B, H, W, C)


class ChannelsFirst(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)  # (B, C, H, W)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _uniform(*shape: int, bound: float) -> Tensor:
    return torch.empty(shape).uniform_(-bound, bound)


def _log_uniform(*shape: int, low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(math.log(low), math.log(high)).exp()


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
