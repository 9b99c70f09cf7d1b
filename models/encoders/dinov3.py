"""DINOv3's vision transformers (Siméoni et al. 2025, arXiv:2508.10104)."""

from typing import Any

from torch import Tensor, nn

from models.encoders.siglip import fused_qkv
from models.encoders.timm_import import timm

DROPPED = (
    "mask_token",  # of the training on masked patches
    "embeddings.mask_token",
    "local_cls_norm.",  # of the training on small crops
    "rope_embed.periods",  # a constant; timm and transformers compute it, the authors' file has it rounded to bf16
)
RENAMED = {  # the authors' names, then transformers', by timm's
    "storage_tokens": "reg_token",
    ".ls1.gamma": ".gamma_1",
    ".ls2.gamma": ".gamma_2",
    "embeddings.cls_token": "cls_token",
    "embeddings.register_tokens": "reg_token",
    "embeddings.patch_embeddings.": "patch_embed.proj.",
    "layer.": "blocks.",
    ".attention.q_proj.bias": ".attn.q_bias",
    ".attention.v_proj.bias": ".attn.v_bias",
    ".attention.q_proj.weight": ".attn.qkv.weight",
    ".attention.o_proj.": ".attn.proj.",
    ".layer_scale1.lambda1": ".gamma_1",
    ".layer_scale2.lambda1": ".gamma_2",
    ".mlp.up_proj.": ".mlp.fc1.",
    ".mlp.down_proj.": ".mlp.fc2.",
}


def class_token_tower(network: str, **hyper: Any) -> nn.Module:
    """The class token after the last norm: the authors' embedding of an image. timm would take the patches' mean."""
    tower: nn.Module = timm.create_model(network, num_classes=0, global_pool="token", **hyper)
    return tower


def build(network: str) -> nn.Module:
    """The network by timm's name; the authors' files carry biases, so their networks end in `_qkvb`."""
    return class_token_tower(network)


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The authors' names, transformers' or timm's own, under timm's."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(DROPPED) or name.endswith((".bias_mask", ".k_proj.weight", ".v_proj.weight")):
            continue  # keys and values join their queries; the mask says that keys have no bias
        if name.endswith(".qkv.bias"):
            block, dim = name.removesuffix("qkv.bias"), len(value) // 3
            ours[f"{block}q_bias"], ours[f"{block}v_bias"] = value[:dim], value[-dim:]
        elif name.endswith(".q_proj.weight"):
            ours[_our_name(name)] = fused_qkv(state, name)
        else:
            ours[_our_name(name)] = value
    return ours


def _our_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name
