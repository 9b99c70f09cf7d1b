"""MambaOut (Yu and Wang 2025, arXiv:2405.07992): gated convolutional blocks without the state space model."""

from typing import Any

from torch import Tensor, nn

from models.encoders.timm_import import timm


class MambaOutEmbedding(nn.Module):
    """The normalised mean over the last map, as CLEAR takes it: 576-d for MambaOut-Tiny.

    timm's own head would put another MLP on top (2304-d), which is trained for ImageNet's classes.
    """

    def __init__(self, network: str) -> None:
        super().__init__()
        self.network: Any = timm.create_model(network, num_classes=0)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, dim)."""
        last_map: Tensor = self.network.forward_features(images)  # (B, H/32, W/32, dim)
        embedding: Tensor = self.network.head.norm(last_map.mean(dim=(1, 2)))  # (B, dim)
        return embedding


def build(network: str) -> nn.Module:
    return MambaOutEmbedding(network)


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """timm's names below ours; the ImageNet classifier `head.fc` is dropped, everything else must fit."""
    return {f"network.{name}": value for name, value in state.items() if not name.startswith("head.fc.")}
