"""BiomedCLIP's image tower (Zhang et al. 2023, arXiv:2303.00915): a ViT-B/16 and its projection to 512-d."""

from typing import Any

from torch import Tensor, nn

import models.encoders.timm_import  # noqa: F401  declares the operators that open_clip's torchvision asks for
from models.specs import MissingWeights

NETWORKS: dict[str, dict[str, Any]] = {"biomedclip": {"trunk": "vit_base_patch16_224", "image_size": 224, "dim": 512}}

TEXT_TOWER = ("text.", "logit_scale")


def image_tower(trunk: str, image_size: int, dim: int) -> nn.Module:
    """open_clip's own tower: the class token after the last norm, mapped to `dim` without a bias.

    CLIP compares directions, but the embedding keeps its length here, as CLEAR's `encode_image` leaves it.
    """
    try:
        from open_clip.timm_model import TimmModel  # an extra: most installations never load BiomedCLIP
    except ModuleNotFoundError as error:
        raise MissingWeights(f"BiomedCLIP needs {error.name}: pip install keyslice[biomedclip]") from error
    tower: nn.Module = TimmModel(trunk, dim, image_size=image_size, pool="", proj="linear")
    return tower


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 3, 224, 224) -> (B, 512)."""
    return image_tower(**NETWORKS[network])


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """open_clip's names below `visual.`; the text tower and the temperature are dropped."""
    return {name.removeprefix("visual."): value for name, value in state.items() if not name.startswith(TEXT_TOWER)}
