"""MambaOut (Yu and Wang 2025, arXiv:2405.07992): gated convolutional blocks without the state space model."""

from typing import Any

from torch import Tensor, nn

from models.checkpoints import moco_encoder
from models.encoders.timm_import import timm

CLASSIFIER = ("head.pre_logits.", "head.fc.")  # timm's names; `head.norm` is the encoder's


class MambaOutEmbedding(nn.Module):
    """The normalised mean over the last map: 288-d for femto and kobe, 576-d for tiny and small, 768-d for base.

    This is `forward_features` of the authors' own class, and what CLEAR takes. timm's head would put another
    MLP on top (2304-d), which is trained for ImageNet's classes.
    """

    def __init__(self, network: str, **hyper_parameters: Any) -> None:
        super().__init__()
        body: Any = timm.create_model(network, num_classes=0, **hyper_parameters)
        body.head.pre_logits = nn.Identity()
        self.network = body

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, dim)."""
        last_map: Tensor = self.network.forward_features(images)  # (B, H/32, W/32, dim)
        embedding: Tensor = self.network.head.norm(last_map.mean(dim=(1, 2)))  # (B, dim)
        return embedding


def build(network: str) -> nn.Module:
    return MambaOutEmbedding(network)


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """timm's names below ours, from timm's checkpoints, the authors' own, and those of CLEAR's MoCo.

    The classifier is dropped, and so is the projector that CLEAR trains in the place of the authors' `head`;
    everything else must fit.
    """
    state = moco_encoder(state)
    if any(name.startswith("downsample_layers.") for name in state):  # the authors' names
        encoder = {name: value for name, value in state.items() if not name.startswith("head.")}
        state = timm.models.mambaout.checkpoint_filter_fn(encoder, network)  # type: ignore[no-untyped-call]
    return {f"network.{name}": value for name, value in state.items() if not name.startswith(CLASSIFIER)}
