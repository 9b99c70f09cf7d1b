"""Where in a slice: a label's evidence, cell by cell, through an encoder and a head.

The head's log-odds of a label have a gradient at the embedding of one instance of a bag. Where the embedding is
pooled from maps by a weighted mean, its product with that gradient falls apart into the maps' cells, exactly:
class activation mapping (Zhou et al. 2016, arXiv:1512.04150) with the gradient in the place of a linear layer's
weights (Selvaraju et al. 2017, arXiv:1610.02391). Elsewhere it is gradient x input.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from models.abmil import Ensemble
from models.load import Embedding
from models.specs import EncoderSpec

INPUT_CELL = 16  # px of the encoder's input: gradients of single pixels are noise


@dataclass(frozen=True)
class HeatMap:
    """Evidence for a label (positive) and against it (negative), to first order."""

    cells: NDArray[np.float64]  # (rows, columns) over the whole slice, log-odds
    method: Literal["decomposition", "gradient"]


@dataclass(frozen=True)
class Pooled:
    """How an embedding comes from maps: tail(the maps' weighted sums over their cells, joined)."""

    parts: list[tuple[Tensor, Tensor]]  # a map (channels, h, w), and the weight of each of its cells (h, w)
    tail: nn.Module


def heat_map(
    spec: EncoderSpec, network: Embedding, picture: NDArray[np.float32], gradient: NDArray[np.float64]
) -> HeatMap:
    """Of one slice at one window: picture (size, size) in [0, 1], gradient (dim,) as label_gradient() gives it.

    A decomposition's cells sum to gradient . embedding (where a norm follows the pooling, to what the pooled maps
    carry through the norm's slope). The spec's kind must be slice2d.
    """
    device = next(network.network.parameters()).device
    images = torch.from_numpy(picture).to(device)[None, None]  # (1, 1, size, size)
    toward = torch.from_numpy(gradient).to(device)  # (dim,) float64
    if spec.family in POOLED:
        with torch.no_grad():
            pooled = POOLED[spec.family](network.network, (images - network.mean) / network.std)
        return HeatMap(_decomposed(pooled, toward).cpu().numpy(), "decomposition")
    return HeatMap(_by_input(network, images, toward).cpu().numpy(), "gradient")


def label_gradient(ensemble: Ensemble, bag: NDArray[np.float16], instance: int, label: int) -> NDArray[np.float64]:
    """(dim,): how the label's log-odds change with the embedding of one instance of the bag (instances, dim).

    The other instances stay as they are; the attention to all of them moves. The ensemble is float64 afterwards.
    """
    embeddings = torch.from_numpy(bag.astype(np.float64))
    one = embeddings[instance].clone().requires_grad_()
    whole = torch.cat([embeddings[:instance], one[None], embeddings[instance + 1 :]])
    probabilities, _ = ensemble.double()(whole)
    (gradient,) = torch.autograd.grad(torch.logit(probabilities[label], eps=1e-12), one)
    found: NDArray[np.float64] = gradient.numpy()
    return found


def _decomposed(pooled: Pooled, toward: Tensor) -> Tensor:
    """(h, w) on the finest map's cells; a coarser cell's evidence is shared by the cells it covers."""
    sums = [torch.einsum("chw,hw->c", cells, weights.float()) for cells, weights in pooled.parts]
    whole = torch.cat(sums).requires_grad_()  # (channels of all maps,)
    (slope,) = torch.autograd.grad(pooled.tail(whole[None])[0].double() @ toward, whole)
    evidence = [
        torch.einsum("c,chw,hw->hw", part.double(), cells.double(), weights.double())
        for part, (cells, weights) in zip(torch.split(slope, [len(each) for each in sums]), pooled.parts, strict=True)
    ]
    finest = max(evidence, key=Tensor.numel).shape
    return torch.stack([_shared(each, finest) for each in evidence]).sum(dim=0)


def _shared(cells: Tensor, shape: torch.Size) -> Tensor:
    """(h, w) -> shape, the sum staying what it is."""
    whole = functional.interpolate(cells[None, None], size=shape, mode="nearest")[0, 0]
    return whole * (cells.numel() / whole.numel())


def _by_input(network: Embedding, images: Tensor, toward: Tensor) -> Tensor:
    """(h, w): gradient x input over squares of INPUT_CELL pixels; the window's lower end, 0, counts for nothing."""
    images = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(network(images)[0].double() @ toward, images)
    product = (slope * images.detach()).double()
    return functional.avg_pool2d(product, INPUT_CELL, divisor_override=1)[0, 0]


def _mean(cells: Tensor) -> tuple[Tensor, Tensor]:
    """A map (channels, h, w) of which the mean is taken."""
    return cells, torch.full_like(cells[0], 1 / cells[0].numel(), dtype=torch.float64)


def _efficientnet(network: Any, images: Tensor) -> Pooled:
    return Pooled([_mean(network.forward_features(images)[0])], nn.Identity())


def _mambaout(network: Any, images: Tensor) -> Pooled:
    last = network.network.forward_features(images)[0]  # (h, w, dim)
    return Pooled([_mean(last.permute(2, 0, 1))], network.network.head.norm)


def _vmamba(network: Any, images: Tensor) -> Pooled:
    return Pooled([_mean(network.map_and_embedding(images)[0][0])], nn.Identity())


def _lesion_lite(network: Any, images: Tensor) -> Pooled:
    """The whole slice's map by its mean, then the fine map's cells by the evidence in them."""
    look = network.whole
    whole = look.blocks(look.stem(functional.avg_pool2d(images, 2))).relu()[0]  # (320, H/64, W/64)
    cells, _ = network.map_and_embedding(images)
    weights = network.evidence(cells)[0].double().flatten().softmax(dim=0).reshape(cells.shape[2:])
    say = network.say(torch.einsum("chw,hw->c", cells[0], weights.float())[None])[0, 0]
    return Pooled([_mean(whole), (cells[0], say * weights)], nn.Identity())


POOLED: dict[str, Callable[[Any, Tensor], Pooled]] = {
    "efficientnet": _efficientnet,
    "lesion_lite": _lesion_lite,
    "mambaout": _mambaout,
    "vmamba": _vmamba,
}
