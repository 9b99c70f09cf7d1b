"""EfficientNet-Lite0 that looks twice: at the whole slice as ImageNet taught it, and closer for lesions.

A lesion of 10 mm fills a thousandth of a slice, and the mean over a map drowns it (docs/fidelity.md has the figures).
Here half of the embedding is pooled by attention: the network's own evidence of a lesion per cell weighs the cells of
a fine map (gated by a softmax, as ABMIL weighs instances; Ligero, Lenz et al., MICCAI 2025, Eq. 5).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.encoders.timm_import import timm

FINE = 4  # the block after which a map has a sixteenth of the input's side; the last has a thirty-second
FINE_CHANNELS, COARSE_CHANNELS = 112, 320
CHANNELS = 256  # of the map that is looked at for lesions
UNLIKELY = -3.0  # the evidence's first bias: few cells hold a lesion
FAINTEST = 0.25  # what is left of the attended half where there is no evidence of a lesion
QUIETER = 0.5  # of the attended half: by cosine, slices are alike first by what they show, then by their lesions


class WholeSlice(nn.Module):
    """The first look: ImageNet's trunk on the picture at half its size. It is never trained.

    What a slice shows, where in the body it lies and whether there is contrast in it is in these features; a trunk
    that is trained on lesions forgets it.
    """

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.stem, self.blocks = _trunk(trunk)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> "WholeSlice":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, 320)."""
        last: Tensor = self.blocks(self.stem(functional.avg_pool2d(images, 2)))  # (B, 320, H/64, W/64)
        return last.relu().mean(dim=(2, 3))


class LesionLite(nn.Module):
    """The embedding is the whole slice's mean (320) beside the attended mean of the fine map (256).

    Training sees both as they are; an embedding has the second weighed by the evidence found, for where there is no
    lesion it says what looked most like one.
    """

    def __init__(self, trunk: str) -> None:
        super().__init__()
        self.whole = WholeSlice(trunk)
        self.stem, self.blocks = _trunk(trunk)
        self.fine = nn.Conv2d(FINE_CHANNELS, CHANNELS, 1)
        self.coarse = nn.Conv2d(COARSE_CHANNELS, CHANNELS, 1)
        self.mixed = nn.Sequential(
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 1), nn.ReLU()
        )
        self.evidence = nn.Conv2d(CHANNELS, 1, 1)
        nn.init.constant_(self.evidence.bias, UNLIKELY)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, 576)."""
        _, embedding = self.map_and_embedding(images)
        whole, attended = embedding[:, :COARSE_CHANNELS], embedding[:, COARSE_CHANNELS:]
        return torch.cat([whole, self.say(attended) * attended], dim=1)

    def say(self, attended: Tensor) -> Tensor:
        """(B, 256) -> (B, 1): how much the attended half counts, by how likely there is a lesion where it looked."""
        likely: Tensor = self.evidence(attended[:, :, None, None]).flatten(1).sigmoid()  # linear: that of the cells
        return QUIETER * (FAINTEST + (1 - FAINTEST) * likely)

    def map_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) -> the fine map (B, 256, H/16, W/16), the embedding (B, 576) with its whole say."""
        x = self.stem(images)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == FINE:
                fine = x  # (B, 112, H/16, W/16)
        above = functional.interpolate(self.coarse(x), size=fine.shape[2:], mode="nearest")  # (B, 256, H/16, W/16)
        cells = self.mixed(functional.relu(self.fine(fine) + above))  # (B, 256, H/16, W/16)
        attention = self.evidence(cells).flatten(2).softmax(dim=2)  # (B, 1, cells)
        attended = (cells.flatten(2) * attention).sum(dim=2)  # (B, 256)
        return cells, torch.cat([self.whole(images), attended], dim=1)

    def take_trunk(self, trunk: Any) -> None:
        """Begin both looks with the weights of timm's network of this kind."""
        for look in (self.whole, self):
            look.stem.load_state_dict(nn.Sequential(trunk.conv_stem, trunk.bn1).state_dict())
            look.blocks.load_state_dict(trunk.blocks.state_dict())


def build(network: str) -> nn.Module:
    return LesionLite(network)


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Nobody else publishes this network: its checkpoints have its own names."""
    return state


def _trunk(name: str) -> tuple[nn.Module, nn.Sequential]:
    """Stem and blocks of timm's network."""
    whole: Any = timm.create_model(name, num_classes=0)
    return nn.Sequential(whole.conv_stem, whole.bn1), whole.blocks
