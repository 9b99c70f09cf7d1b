"""SigLIP's image tower (Zhai et al. 2023, arXiv:2303.15343) at the size of MedSigLIP (arXiv:2507.05201)."""

from typing import Any

import torch
from torch import Tensor, nn

from models.encoders.timm_import import timm
from models.specs import WrongWeights

NETWORKS: dict[str, dict[str, Any]] = {"medsiglip_448": {"img_size": 448}}

TEXT_TOWER = ("text_model.", "logit_scale", "logit_bias")
RENAMED = {
    "vision_model.embeddings.patch_embedding.": "patch_embed.proj.",
    "vision_model.encoder.layers.": "blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    ".self_attn.out_proj.": ".attn.proj.",
    "vision_model.post_layernorm.": "norm.",
    "vision_model.head.probe": "attn_pool.latent",
    "vision_model.head.attention.out_proj.": "attn_pool.proj.",
    "vision_model.head.layernorm.": "attn_pool.norm.",
    "vision_model.head.mlp.": "attn_pool.mlp.",
}


def vision_tower(**hyper: Any) -> nn.Module:
    """SoViT-400m/14, pooled by one learnt query that attends to all patches; `hyper` replaces timm's hyper-parameters.

    GELU is the tanh approximation, as SigLIP was trained; timm's default for this network is the exact one.
    """
    tower: nn.Module = timm.create_model("vit_so400m_patch14_siglip_378", num_classes=0, act_layer="gelu_tanh", **hyper)
    return tower


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 3, 448, 448) -> (B, 1152); SigLIP has no projection behind it."""
    return vision_tower(**NETWORKS[network])


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The tensors of transformers' SiglipModel under timm's names; the text tower, scale and bias are dropped."""
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.startswith(TEXT_TOWER) or ".k_proj." in name or ".v_proj." in name:
            continue  # keys and values join their queries
        if ".q_proj." in name:
            ours[_our_name(name.replace(".self_attn.q_proj.", ".attn.qkv."))] = fused_qkv(state, name)
        elif name == "vision_model.embeddings.position_embedding.weight":
            ours["pos_embed"] = value.unsqueeze(0)  # (1, patches, dim)
        elif name.startswith("vision_model.head.attention.in_proj_"):
            kind, dim = name.rpartition("_")[2], len(value) // 3
            ours[f"attn_pool.q.{kind}"], ours[f"attn_pool.kv.{kind}"] = value[:dim], value[dim:]
        else:
            ours[_our_name(name)] = value
    return ours


def fused_qkv(state: dict[str, Tensor], queries: str) -> Tensor:
    """The queries' tensor above its keys' and values': transformers keeps three, timm one."""
    names = [queries.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
    shapes = {name: tuple(state[name].shape) for name in names if name in state}
    if len(shapes) != 3 or len(set(shapes.values())) != 1:
        raise WrongWeights(f"expected {', '.join(names)} of one shape, found {shapes}")
    return torch.cat([state[name] for name in names])


def _our_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name
