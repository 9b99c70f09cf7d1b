"""CT-ViT, the image encoder of CT-CLIP (Hamamci et al. 2024, arXiv:2403.17834): attention in space, then in depth."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NETWORKS: dict[str, dict[str, Any]] = {
    "ctvit": {
        "shape": (240, 480, 480),
        "patch": (10, 20, 20),
        "dim": 512,
        "heads": 8,
        "dim_head": 32,
        "spatial_depth": 4,
        "temporal_depth": 4,
        "codes": 8192,
        "dim_latent": 512,
    },
    "test_ctvit": {
        "shape": (16, 24, 16),
        "patch": (4, 8, 4),
        "dim": 16,
        "heads": 2,
        "dim_head": 8,
        "spatial_depth": 2,
        "temporal_depth": 2,
        "codes": 32,
        "dim_latent": 24,
    },
}

# Beside the encoder, a checkpoint of CT-CLIP holds its text tower and projections, the decoder and first frame of the
# autoencoder it comes from, the codebook's training statistics, and norms for a cross-attention it does not have.
BESIDE = re.compile(
    r"(text_transformer|to_text_latent|to_text_latent_extra|to_visual_latent_extra)\.|temperature$"
    r"|visual_transformer\.(to_patch_emb_first_frame|to_pixels_first_frame|to_pixels)\."
    r"|visual_transformer\.vq\._codebook\.(initted|cluster_size)$"
    r"|visual_transformer\..+\.context_norm\.(gamma|beta)$"
)
RENAMED = {
    r"(\.layers\.\d+)\.0\.": r"\1.peg.",
    r"(\.layers\.\d+)\.1\.": r"\1.attention.",
    r"(\.layers\.\d+)\.3\.": r"\1.feed_forward.",
    r"\.vq\._codebook\.": ".vq.",
}

COSINE_SCALE = 8.0  # of attention


class CTCLIPImage(nn.Module):
    """CT-CLIP's image latent, before the division by its length that makes products with text latents cosines."""

    def __init__(self, shape: tuple[int, int, int], patch: tuple[int, int, int], dim_latent: int, **vit: int) -> None:
        super().__init__()
        depth, height, width = (size // step for size, step in zip(shape, patch, strict=True))
        self.visual_transformer = CTViT((depth, height, width), patch, **vit)
        self.to_visual_latent = nn.Linear(height * width * vit["dim"], dim_latent, bias=False)

    def forward(self, volumes: Tensor) -> Tensor:
        """volumes (B, 1, D, H, W) in [-1, 1], axes to the head, to the left, to the back -> (B, dim_latent)."""
        tokens = self.visual_transformer(volumes).mean(dim=1)  # (B, h, w, dim)
        latent: Tensor = self.to_visual_latent(tokens.flatten(1))
        return latent


class CTViT(nn.Module):
    """Patches of a volume as entries of a codebook; of the autoencoder only the encoder."""

    def __init__(
        self,
        grid: tuple[int, int, int],
        patch: tuple[int, int, int],
        dim: int,
        heads: int,
        dim_head: int,
        spatial_depth: int,
        temporal_depth: int,
        codes: int,
    ) -> None:
        super().__init__()
        voxels = patch[0] * patch[1] * patch[2]
        embed = nn.Linear(voxels, dim)
        self.to_patch_emb = nn.Sequential(Patches(patch), nn.LayerNorm(voxels), embed, nn.LayerNorm(dim))
        self.spatial_rel_pos_bias = ContinuousPositionBias(grid[1], grid[2], dim, heads)
        self.enc_spatial_transformer = Transformer(spatial_depth, grid, dim, heads, dim_head)
        self.enc_temporal_transformer = Transformer(temporal_depth, grid, dim, heads, dim_head)
        self.vq = CosineCodebook(codes, dim)

    def forward(self, volumes: Tensor) -> Tensor:
        """volumes (B, 1, D, H, W) -> (B, d, h, w, dim)."""
        tokens: Tensor = self.to_patch_emb(volumes)  # (B, d, h, w, dim)
        batch, depth, height, width, dim = tokens.shape
        tokens = tokens.reshape(batch * depth, height * width, dim)
        tokens = self.enc_spatial_transformer(tokens, self.spatial_rel_pos_bias())  # (B d, h w, dim)
        tokens = tokens.view(batch, depth, height * width, dim).transpose(1, 2).flatten(0, 1)
        tokens = self.enc_temporal_transformer(tokens)  # (B h w, d, dim)
        tokens = tokens.view(batch, height, width, depth, dim).permute(0, 3, 1, 2, 4)  # (B, d, h, w, dim)
        quantised: Tensor = self.vq(tokens)
        return quantised


class Patches(nn.Module):
    def __init__(self, patch: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch = patch

    def forward(self, volumes: Tensor) -> Tensor:
        """volumes (B, 1, D, H, W) -> (B, d, h, w, voxels of a patch)."""
        depth, height, width = self.patch
        d, h, w = (size // step for size, step in zip(volumes.shape[2:], self.patch, strict=True))
        x = volumes.reshape(-1, d, depth, h, height, w, width)
        return x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)


class ContinuousPositionBias(nn.Module):
    """Attention's bias from the logarithmic distance of two tokens (Liu et al. 2022, arXiv:2111.09883, Eq. 3 and 4).

    It is worked out once for each distance that occurs, not for each pair of tokens.
    """

    distances: Tensor
    pairs: Tensor

    def __init__(self, height: int, width: int, dim: int, heads: int) -> None:
        super().__init__()
        first = nn.Sequential(nn.Linear(2, dim), nn.LeakyReLU(0.1))
        second = nn.Sequential(nn.Linear(dim, dim), nn.LeakyReLU(0.1))
        self.net = nn.Sequential(first, second, nn.Linear(dim, heads))
        distances = torch.cartesian_prod(torch.arange(1 - height, height), torch.arange(1 - width, width))
        row, column = torch.cartesian_prod(torch.arange(height), torch.arange(width)).T  # (h w) each
        down, right = row[:, None] - row + height - 1, column[:, None] - column + width - 1  # (h w, h w)
        self.register_buffer("distances", distances.sign() * torch.log(distances.abs() + 1.0), persistent=False)
        self.register_buffer("pairs", down * (2 * width - 1) + right, persistent=False)  # which distance it is

    def forward(self) -> Tensor:
        """-> (heads, h w, h w)."""
        bias: Tensor = self.net(self.distances)  # (distances, heads)
        return bias[self.pairs].permute(2, 0, 1)


class Transformer(nn.Module):
    def __init__(self, depth: int, grid: tuple[int, int, int], dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(grid, dim, heads, dim_head) for _ in range(depth))
        self.norm_out = LayerNorm(dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (sequences, N, dim) and bias (heads, N, N) -> (sequences, N, dim)."""
        for block in self.layers:
            x = block(x, bias)
        normed: Tensor = self.norm_out(x)
        return normed


class Block(nn.Module):
    def __init__(self, grid: tuple[int, int, int], dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.peg = PositionGenerator(grid, dim)
        self.attention = Attention(dim, heads, dim_head)
        self.feed_forward = _feed_forward(dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x = x + self.peg(x)
        x = x + self.attention(x, bias)
        x = x + self.feed_forward(x)
        return x


class PositionGenerator(nn.Module):
    """A depth-wise convolution over the grid of tokens (Chu et al. 2023, arXiv:2102.10882), causal in depth.

    In the second transformer the tokens lie as (B, h, w, d), and CT-CLIP reads them as (B, d, h, w) all the same.
    Its weights were trained so, and so it is here.
    """

    def __init__(self, grid: tuple[int, int, int], dim: int) -> None:
        super().__init__()
        self.grid = grid
        self.dsconv = nn.Conv3d(dim, dim, kernel_size=3, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (sequences, N, dim), all tokens of each volume in one run -> the same shape."""
        volume = x.reshape(-1, *self.grid, x.shape[-1]).permute(0, 4, 1, 2, 3)  # (B, dim, d, h, w)
        mixed: Tensor = self.dsconv(functional.pad(volume, (1, 1, 1, 1, 2, 0)))  # two planes below, none above
        return mixed.permute(0, 2, 3, 4, 1).reshape(x.shape)


class Attention(nn.Module):
    """Self-attention by scaled cosine; queries are of the normed tokens, keys and values of the tokens as they come."""

    def __init__(self, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * dim_head, bias=False)
        self.q_scale = nn.Parameter(torch.ones(dim_head))
        self.k_scale = nn.Parameter(torch.ones(dim_head))
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (sequences, N, dim) and bias (heads, N, N) -> (sequences, N, dim)."""
        sequences, length, _ = x.shape
        by_head = (sequences, length, self.heads, -1)
        q, (k, v) = self.to_q(self.norm(x)), self.to_kv(x).chunk(2, dim=-1)
        q, k, v = (each.reshape(by_head).transpose(1, 2) for each in (q, k, v))  # (sequences, heads, N, dim_head)
        q = functional.normalize(q, dim=-1) * self.q_scale
        k = functional.normalize(k, dim=-1) * self.k_scale
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=COSINE_SCALE)
        mixed: Tensor = self.to_out(attended.transpose(1, 2).flatten(2))
        return mixed


class CosineCodebook(nn.Module):
    """For each token the codebook's entry at the smallest angle (Yu et al. 2022, arXiv:2110.04627)."""

    embed: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("embed", torch.randn(1, codes, dim))  # of one codebook

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (..., dim) -> the same shape."""
        codebook = self.embed[0]
        cosine = functional.normalize(tokens, dim=-1) @ functional.normalize(codebook, dim=-1).T  # (..., codes)
        return codebook[cosine.argmax(dim=-1)]


class LayerNorm(nn.Module):
    """Without a learnt offset; `beta` stays 0."""

    beta: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))
        self.register_buffer("beta", torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.gamma.shape, self.gamma, self.beta)


class GEGLU(nn.Module):
    """Half of the features, gated by the other half (Shazeer 2020, arXiv:2002.05202)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., 2 inner) -> (..., inner)."""
        value, gate = x.chunk(2, dim=-1)
        return value * functional.gelu(gate)


def _feed_forward(dim: int) -> nn.Sequential:
    inner = int(4 * (2 / 3) * dim)
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, 2 * inner, bias=False),
        GEGLU(),
        nn.Dropout(0.0),  # CT-CLIP's, and the place of the last layer's name
        nn.Linear(inner, dim, bias=False),
    )


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 1, 240, 480, 480) -> (B, 512)."""
    return CTCLIPImage(**NETWORKS[network])


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """CT-CLIP's image tower and its projection, under names that say what the layers of a block are."""
    # null_kv, keys and values to attend to beside the tokens', has none and so no elements.
    beside = {name for name in state if BESIDE.match(name) or (name.endswith(".null_kv") and not state[name].numel())}
    return {_our_name(name): value for name, value in state.items() if name not in beside}


def _our_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = re.sub(theirs, ours, name)
    return name
