"""The networks that pretraining trains: each encoder's own, asked for its last map beside its embedding."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.load import Embedding, load_network
from models.specs import EncoderSpec

Looked = tuple[Tensor, Tensor]  # map (B, channels, h, w), embedding (B, dim)

PROBE = 64  # px: large enough for a map of every network of free input size


class Backbone(nn.Module):
    """An encoder's network in training; `network` is the very module that the encoder runs."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: EncoderSpec, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._look = LOOKS[spec.family]
        normalised = Embedding(network, spec.mean, spec.std, axes=2)
        self.register_buffer("mean", normalised.mean, persistent=False)
        self.register_buffer("std", normalised.std, persistent=False)
        size = spec.input_size if spec.family == "vit_conv" else PROBE
        with torch.no_grad():
            map, embedding = self.eval()(torch.zeros(1, 1, size, size))
        self.train()
        self.channels, self.dim = map.shape[1], embedding.shape[1]

    def forward(self, images: Tensor) -> Looked:
        """images (B, 1, H, W) in [0, 1] -> the last map (B, channels, h, w), the embedding (B, dim)."""
        pictures = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)  # (B, 3, H, W)
        return self._look(self.network, pictures)


def backbone(spec: EncoderSpec, weights_dir: Path | None) -> Backbone:
    """The encoder's network, with its weights where `weights_dir` is given, else fresh."""
    network = importlib.import_module(f"models.encoders.{spec.family}").build(spec.network)
    if weights_dir:  # into a fresh one, which says what of it is trained: a ViT's positions are not
        network.load_state_dict(load_network(spec, weights_dir).state_dict())
    return Backbone(spec, network.to(memory_format=torch.channels_last))


def _efficientnet(network: Any, images: Tensor) -> Looked:
    last: Tensor = network.forward_features(images)  # (B, 1280, h, w)
    return last, last.mean(dim=(2, 3))


def _mambaout(network: Any, images: Tensor) -> Looked:
    last: Tensor = network.network.forward_features(images)  # (B, h, w, dim)
    return last.permute(0, 3, 1, 2), network.network.head.norm(last.mean(dim=(1, 2)))


def _vit_conv(network: Any, images: Tensor) -> Looked:
    tokens: Tensor = network.forward_features(images)  # (B, 1 + h * w, dim)
    side = round((tokens.shape[1] - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, side, side), tokens[:, 0]


def _own(network: Any, images: Tensor) -> Looked:
    looked: Looked = network.map_and_embedding(images)
    return looked


LOOKS: dict[str, Callable[[Any, Tensor], Looked]] = {
    "efficientnet": _efficientnet,
    "mambaout": _mambaout,
    "vit_conv": _vit_conv,
    "vmamba": _own,
    "lesion_lite": _own,
}
