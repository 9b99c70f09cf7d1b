"""The inflated ResNet (I3D, arXiv:1705.07750) of Merlin (Blankemeier et al. 2024, arXiv:2406.06512) and of Astra."""

from typing import Any

import torch
from torch import Tensor, nn

NETWORKS: dict[str, dict[str, Any]] = {
    "i3_resnet152": {"blocks": (3, 8, 36, 3)},
    "test_i3_resnet": {"blocks": (2, 1, 1, 1), "width": 4},
}

EXPANSION = 4  # of a bottleneck's channels at its end

IMAGE_TOWER = "encode_image.i3_resnet."
BESIDE = ("encode_text.", "logit_scale", "classifier.", "contrastive_head.")


class Bottleneck(nn.Module):
    """ResNet's bottleneck with its middle convolution inflated in depth."""

    def __init__(self, channels: int, planes: int, stride: int) -> None:
        super().__init__()
        out = planes * EXPANSION
        self.conv1 = nn.Conv3d(channels, planes, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm3d(planes)
        self.conv2 = nn.Conv3d(planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(planes)
        self.conv3 = nn.Conv3d(planes, out, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm3d(out)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            shortcut = nn.Conv3d(channels, out, kernel_size=1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(out))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, D, H, W) -> (B, 4 planes, D / stride, H / stride, W / stride)."""
        residual = self.bn1(self.conv1(x)).relu_()
        residual = self.bn2(self.conv2(residual)).relu_()
        residual = self.bn3(self.conv3(residual))
        return torch.relu_(residual + self.downsample(x))


class I3ResNet(nn.Module):
    """The mean over the last map, 2048-d, which Merlin calls its image embedding.

    Its contrastive head would project it to 512-d to be compared with text, its classifier to 1692 phenotypes.
    """

    def __init__(self, blocks: tuple[int, int, int, int], width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(3, width, kernel_size=(3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.maxpool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.layer1 = _layer(width, width, blocks[0], stride=1)
        self.layer2 = _layer(width * EXPANSION, width * 2, blocks[1], stride=2)
        self.layer3 = _layer(width * 2 * EXPANSION, width * 4, blocks[2], stride=2)
        self.layer4 = _layer(width * 4 * EXPANSION, width * 8, blocks[3], stride=2)

    def forward(self, volumes: Tensor) -> Tensor:
        """volumes (B, 1, D, H, W), axes to the head, to the right, to the front -> (B, 32 width).

        Merlin takes (B, 1, H, W, D) and begins by moving depth to the front; models.ct.volume has done that.
        """
        x = volumes.expand(-1, 3, -1, -1, -1)  # for filters inflated from colour images
        x = self.bn1(self.conv1(x)).relu_()  # (B, width, D, H/2, W/2)
        x = self.maxpool(x)  # (B, width, D/2, H/4, W/4)
        x = self.layer1(x)  # (B, 4 width, D/2, H/4, W/4)
        x = self.layer2(x)  # (B, 8 width, D/4, H/8, W/8)
        x = self.layer3(x)  # (B, 16 width, D/8, H/16, W/16)
        x = self.layer4(x)  # (B, 32 width, D/16, H/32, W/32)
        embedding: Tensor = x.mean(dim=(2, 3, 4))
        return embedding


def _layer(channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(channels, planes, stride)
    return nn.Sequential(first, *(Bottleneck(planes * EXPANSION, planes, stride=1) for _ in range(1, blocks)))


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 1, D, H, W) -> (B, 2048)."""
    return I3ResNet(**NETWORKS[network])


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The image tower of Merlin's whole checkpoint, or the bare one of Astra; text tower and heads are dropped."""
    bare = {name.removeprefix(IMAGE_TOWER): value for name, value in state.items()}
    return {name: value for name, value in bare.items() if not name.startswith(BESIDE)}
