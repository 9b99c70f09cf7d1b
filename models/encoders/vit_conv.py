"""ViT with a convolutional stem and fixed 2D sine-cosine positions (Chen et al. 2021, MoCo-v3, arXiv:2104.02057)."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.checkpoints import moco_encoder
from models.encoders.timm_import import timm

# One block fewer than ViT-Small and ViT-Base: the stem stands for it (Xiao et al. 2021, arXiv:2106.14881).
# MoCo-v3's small has 12 heads, not the 6 of DeiT's.
NETWORKS = {
    "vit_conv_small": {"dim": 384, "depth": 11, "heads": 12},
    "vit_conv_base": {"dim": 768, "depth": 11, "heads": 12},
}

STRIDE = 16  # pixels a token


class ViTConv(timm.models.VisionTransformer):
    """timm's ViT behind a convolutional stem; the embedding is the class token after the final norm."""

    def __init__(self, dim: int, depth: int, heads: int, input_size: int = 224) -> None:
        super().__init__(
            img_size=input_size, patch_size=STRIDE, embed_dim=dim, depth=depth, num_heads=heads, num_classes=0
        )
        self.patch_embed.proj = ConvStem(dim)
        self.pos_embed = nn.Parameter(sine_cosine_positions(input_size // STRIDE, dim), requires_grad=False)


class ConvStem(nn.Sequential):
    """Four 3 x 3 convolutions of stride 2, then one 1 x 1, in place of the patches' linear layer.

    images (B, 3, H, W) -> (B, dim, H/16, W/16).
    """

    def __init__(self, dim: int) -> None:
        layers: list[nn.Module] = []
        for before, width in pairwise((3, dim // 8, dim // 4, dim // 2, dim)):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(dim, dim, 1))


def sine_cosine_positions(grid: int, dim: int) -> Tensor:
    """(1, 1 + grid^2, dim): zeros for the class token, then sin and cos of each token's row and of its column."""
    frequencies = 1 / 10000.0 ** (torch.arange(dim // 4) / (dim // 4))  # (dim / 4,)
    angles = torch.outer(torch.arange(grid), frequencies)  # (grid, dim / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    rows = waves.repeat_interleave(grid, dim=0)  # (grid^2, dim / 2)
    columns = waves.repeat(grid, 1)  # (grid^2, dim / 2)
    tokens = torch.cat([rows, columns], dim=1)  # (grid^2, dim)
    return torch.cat([torch.zeros(1, dim), tokens]).unsqueeze(0)


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 3, 224, 224) -> (B, dim)."""
    return ViTConv(**NETWORKS[network])


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A MoCo-v3 checkpoint's encoder; its names are timm's.

    `head.`, be it MoCo's projector, a linear probe or a fine-tuned classifier, is dropped. The positions are
    a tensor of the checkpoint and are taken from there: fine-tuning may have moved them, and the blocks were
    trained with these.
    """
    return {name: value for name, value in moco_encoder(state).items() if not name.startswith("head.")}
