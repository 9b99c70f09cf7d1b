"""SAM 2's image encoder (Ravi et al. 2024, arXiv:2408.00714): a Hiera trunk and the neck of its mask decoder.

`sam2_hiera_large` is the mean over the trunk's last map (1152-d). `sam2_hiera_large_neck` is the mean over the
map that SAM 2 calls the image's embedding (256-d); CLEAR compares itself with this one at 224 pixels.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import interpolate

from models.encoders.timm_import import timm

NECK = "image_encoder.neck."
DROPPED = (
    "head.",  # timm's norm before a classifier; SAM 2 has neither
    f"{NECK}convs.2.",  # strides 8 and 4, which only the mask decoder reads
    f"{NECK}convs.3.",
    "mask_downsample.",
    "maskmem_tpos_enc",
    "memory_attention.",
    "memory_encoder.",
    "no_mem_",
    "no_obj_",
    "obj_ptr_",
    "sam_mask_decoder.",
    "sam_prompt_encoder.",
)
RENAMED = {
    "image_encoder.trunk.": "trunk.",
    f"{NECK}convs.0.conv.": "lateral32.",
    f"{NECK}convs.1.conv.": "lateral16.",
    ".mlp.layers.0.": ".mlp.fc1.",
    ".mlp.layers.1.": ".mlp.fc2.",
}


class SAM2Trunk(nn.Module):
    """The mean over the last map of the Hiera trunk. `hyper` replaces timm's hyper-parameters of `network`."""

    def __init__(self, network: str, **hyper: Any) -> None:
        super().__init__()
        self.trunk: Any = _hiera(network, **hyper)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, dim)."""
        last_map: Tensor = self.trunk.forward_features(images)  # (B, H/32, W/32, dim)
        return last_map.mean(dim=(1, 2))  # (B, dim)


class SAM2Neck(nn.Module):
    """The mean over the stride-16 map of SAM 2's feature pyramid, its `vision_features`.

    The pyramid's top, at stride 32, is added to this map and then left out (`scalp: 1` in SAM 2's configurations);
    the finer maps take nothing from above and give nothing to it.
    """

    def __init__(self, network: str, dim: int = 256, **hyper: Any) -> None:
        super().__init__()
        self.trunk: Any = _hiera(network, **hyper)
        *_, stride16, stride32 = (stage["num_chs"] for stage in self.trunk.feature_info)
        self.lateral16 = nn.Conv2d(stride16, dim, kernel_size=1)
        self.lateral32 = nn.Conv2d(stride32, dim, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W), H and W multiples of 32 -> (B, dim)."""
        stride16, stride32 = self.trunk.forward_intermediates(images, indices=2, intermediates_only=True)
        top = self.lateral32(stride32)  # (B, dim, H/32, W/32)
        embedding: Tensor = self.lateral16(stride16) + interpolate(top, scale_factor=2.0)  # (B, dim, H/16, W/16)
        return embedding.mean(dim=(2, 3))  # (B, dim)


def _hiera(network: str, **hyper: Any) -> Any:
    trunk: Any = timm.create_model(network, num_classes=0, **hyper)
    trunk.reset_classifier(0, reset_other=True)  # timm's norm behind the trunk goes too
    return trunk


def build(network: str) -> nn.Module:
    """The trunk by timm's name; behind `_neck`, the trunk with its neck."""
    trunk = network.removesuffix("_neck")
    return SAM2Trunk(trunk) if trunk == network else SAM2Neck(trunk)


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Meta's names, or timm's of the trunk alone, under ours.

    Prompts, masks and memory are dropped, and so is the neck where the network has none.
    """
    dropped = DROPPED if isinstance(network, SAM2Neck) else (*DROPPED, NECK)
    return {_our_name(name): value for name, value in state.items() if not name.startswith(dropped)}


def _our_name(name: str) -> str:
    ours = name if name.startswith("image_encoder.") else f"trunk.{name}"
    for theirs, renamed in RENAMED.items():
        ours = ours.replace(theirs, renamed)
    return ours
