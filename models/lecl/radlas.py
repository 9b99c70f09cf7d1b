"""RadLAS's two tasks (Liu et al., ACM MM 2025), read onto CT slices: restore to health, and contrast the evidence.

Only the abstract is known to us. It says: "restoring lesion-aware image patches into their healthy counterparts,
thereby facilitating pixel-level grounding of lesion evidence via input-normal contrast", and "decoupling grounded
lesion evidence as clinical cues and aligning them with global semantics". We read it so:

* Reconstruction: a light decoder restores the slice without its planted lesion from the encoder's map alone. It sees
  no pixel of the input, not even blurred ones: it could copy them, and a large lesion survives any blur.
* Grounding: where input and restoration differ by more than they do on average over the slice.
* Discrimination: what the map holds there is drawn to the slice's own embedding, and away from the other slices'
  embeddings and from what the maps of lesion slices hold elsewhere.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.lecl.losses import similarities


class Restorer(nn.Module):
    """Restores a slice without its lesion from the encoder's map; light, for it is thrown away after pretraining."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        widths = (width, width, width // 2, width // 4)
        self.narrow = nn.Conv2d(channels, width, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(1, after), nn.GELU())
            for before, after in pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(self, map: Tensor, size: int) -> Tensor:
        """map (B, channels, h, w) of any stride -> (B, 1, size, size), on the scale of the input.

        Convolves at an eighth, a quarter and half of the size; the last doubling is bilinear, which costs nothing
        and loses nothing the grounding would keep.
        """
        x = self.narrow(map)  # (B, width, h, w)
        for block, part in zip(self.blocks, (8, 4, 2), strict=True):
            x = block(resized(x, max(size // part, x.shape[-1])))  # (B, ., size / part, size / part), or the map's size
        return resized(self.last(x), size)  # (B, 1, size, size)


class Projections(nn.Module):
    """Takes what is pooled from a map and a slice's embedding into one space, where they are compared."""

    def __init__(self, channels: int, dim: int, hidden: int = 512, out: int = 128) -> None:
        super().__init__()
        self.region = nn.Sequential(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.slice = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out))


def reconstruction_loss(restored: Tensor, healthy: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute error, a scalar, where a lesion counts for half of its slice however small it is.

    restored, healthy (B, 1, H, W); mask (B, 1, H, W) in [0, 1], the share of each pixel that is lesion.
    Per slice, with e = |restored - healthy|: (sum (1 - m) e / sum (1 - m) + sum m e / sum m) / 2; without a lesion
    the first term alone.
    """
    error = (restored - healthy).abs()  # (B, 1, H, W)
    inside = weighted_mean(error, mask)  # (B, 1)
    outside = weighted_mean(error, 1 - mask)  # (B, 1)
    share = 0.5 * (mask.sum(dim=(2, 3)) > 0)  # (B, 1)
    return (share * inside + (1 - share) * outside).mean()


def grounding(view: Tensor, restored: Tensor, sigma: float = 2.0) -> Tensor:
    """Evidence of a lesion per pixel (B, 1, H, W) in [0, 1], of view and restored (B, 1, H, W).

    d = |G_sigma * (view - restored)|, sigma in pixels; max(d - mean d, 0) / (max d - mean d), per slice. The signed
    difference is smoothed, so that noise and the edges a restoration blurs cancel, and a lesion, all lighter or all
    darker than health, does not. A view that equals its restoration gives zeros.
    """
    with torch.autocast(device_type=view.device.type, enabled=False):
        difference = smoothed(view.float() - restored.float(), sigma).abs()  # (B, 1, H, W)
    mean = difference.mean(dim=(2, 3), keepdim=True)
    peak = difference.amax(dim=(2, 3), keepdim=True)
    return (difference - mean).clamp(min=0) / (peak - mean).clamp(min=1e-6)


def discrimination_loss(
    map: Tensor, grounding: Tensor, embedding: Tensor, lesion: Tensor, temperature: float, projections: Projections
) -> Tensor:
    """The contrast of evidence, a scalar in nats: mean over the lesion slices, 0 (with a graph) where there are none.

    map (B, C, h, w); grounding (B, 1, H, W); embedding (B, dim); lesion (B,) bool. g is the grounding's mean per cell,
    E = P_region(mean of the map by g), R = P_region(mean by 1 - g), S = P_slice(embedding), sim the cosine:
    -log( exp(sim(E_i, S_i) / tau) / (sum_j exp(sim(E_i, S_j) / tau) + sum_l exp(sim(E_i, R_l) / tau)) ),
    i and l over lesion slices, j over all slices of this process. No gradient flows into the grounding: where the
    lesion is, the reconstruction says, and the contrast may not bend it.
    """
    g = functional.adaptive_avg_pool2d(grounding.detach(), (map.shape[2], map.shape[3]))  # (B, 1, h, w)
    evidence = projections.region(weighted_mean(map, g))  # (B, out)
    rest = projections.region(weighted_mean(map, 1 - g))  # (B, out)
    slices = projections.slice(embedding)  # (B, out)
    to_slices = similarities(evidence, slices, temperature)  # (B, B)
    to_rest = similarities(evidence, rest, temperature).masked_fill(~lesion, float("-inf"))  # (B, B)
    losses = torch.cat([to_slices, to_rest], dim=1).logsumexp(dim=1) - to_slices.diagonal()  # (B,)
    # Every slice goes through, also in a batch without lesions: all processes then have the same graph.
    return (losses * lesion).sum() / lesion.sum().clamp(min=1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """values (B, C, h, w), weights (B, 1, h, w) -> (B, C), as exact as the weights; zeros where they are zero."""
    return (values * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3)).clamp(min=1e-6)


def smoothed(images: Tensor, sigma: float) -> Tensor:
    """images (B, 1, H, W) under a Gaussian of this sigma in pixels, cut at three sigma; edges are repeated outwards."""
    reach = int(3 * sigma + 0.5)
    offsets = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)  # exp, made to sum to 1
    padded = functional.pad(images, (reach, reach, reach, reach), mode="replicate")
    return functional.conv2d(functional.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))


def resized(maps: Tensor, size: int) -> Tensor:
    """maps (B, C, h, w) -> (B, C, size, size), bilinear."""
    return functional.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)
