"""MoCo-v3 (Chen et al. 2021, arXiv:2104.02057) on any backbone, its contrast LECL where lesions are known."""

import copy
import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.encoders.timm_import import timm
from models.lecl.losses import lecl

if TYPE_CHECKING:
    from models.lecl.networks import Backbone


class MoCo(nn.Module):
    """Sets slices apart by contrast; with a weight above 0 the loss is LECL.

    `online` is the backbone that is trained, and is shared with whoever made it; hidden and out are the widths of the
    two MLPs (MoCo-v3: 4096 and 256, three layers and two, as it has them for ViT and CLEAR for all its networks).
    Call `update` once after each step of the optimiser. Who runs several processes converts the batch norms.
    """

    def __init__(self, online: "Backbone", temperature: float, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.online = online
        self.temperature = temperature
        self.projector = mlp(online.dim, hidden, hidden, out)
        self.predictor = mlp(out, hidden, out)
        self.momentum_backbone = copy.deepcopy(online).requires_grad_(False)
        self.momentum_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def forward(self, view_embedding: Tensor, view: Tensor, other: Tensor, lesion: Tensor, weight: float) -> Tensor:
        """The loss in nats, the sum of both directions: view against other's keys, and other against view's.

        view_embedding (B, dim): what the online backbone made of `view`, computed once for all objectives;
        view, other (B, 1, S, S) in [0, 1]; lesion (B,) bool; weight is LECL's lambda, and 0 is MoCo-v3.
        For LECL `other` is the crop around the lesion where the slice has one: both then take both roles.
        """
        q1 = self.query(view_embedding)  # (B, out)
        q2 = self.query(self.online(other)[1])  # (B, out)
        k1, k2 = self.key(view), self.key(other)  # (B, out)
        return lecl(q1, k2, lesion, self.temperature, weight) + lecl(q2, k1, lesion, self.temperature, weight)

    def query(self, embedding: Tensor) -> Tensor:
        """embedding (B, dim) -> what is compared with keys (B, out)."""
        query: Tensor = self.predictor(self.projector(embedding))
        return query

    @torch.no_grad()
    def key(self, images: Tensor) -> Tensor:
        """images (B, 1, S, S) -> keys (B, out), without gradient."""
        key: Tensor = self.momentum_projector(self.momentum_backbone(images)[1])
        return key

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Eq. 3: theta_k <- m theta_k + (1 - m) theta_q.

        Parameters only, as in MoCo-v3: a batch norm of the momentum branch keeps the statistics of its own batches.
        """
        pairs = (self.online, self.momentum_backbone), (self.projector, self.momentum_projector)
        for online, slow in pairs:
            for theta_q, theta_k in zip(online.parameters(), slow.parameters(), strict=True):
                theta_k.lerp_(theta_q, 1 - momentum)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, batch norm after each, ReLU between; the last norm has no scale and no shift."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    return nn.Sequential(*layers[:-2], nn.BatchNorm1d(widths[-1], affine=False))


def momentum_at(progress: float, start: float = 0.99) -> float:
    """The momentum at this share of the training: from `start` to 1 along half a cosine (MoCo-v3's --moco-m-cos)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def freeze_patch_stem(backbone: nn.Module) -> bool:
    """Stops the gradient at a ViT's patch projection (MoCo-v3, section 4.2); says whether there was one.

    MoCo-v3 freezes the plain linear projection alone: a convolutional stem, which is stable without, stays trained,
    and networks that are no ViT have none.
    """
    stems = [module.proj for module in backbone.modules() if isinstance(module, timm.layers.patch_embed.PatchEmbed)]
    plain = [stem for stem in stems if isinstance(stem, nn.Conv2d)]
    for stem in plain:
        stem.requires_grad_(False)
    return bool(plain)
