import importlib.util
import math
import sys

import pytest
import torch
from conftest import missing
from torch import nn
from torch.nn import functional

from models.encoders import biomedclip, dinov3, sam2, siglip
from models.encoders.timm_import import timm
from models.specs import MissingWeights, WrongWeights

DIM, DEPTH, HEADS = 32, 2, 2
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def open_clip():
    if not importlib.util.find_spec("open_clip"):
        missing("the extra `biomedclip` is not installed")
    import open_clip

    return open_clip


def with_random_weights(network, seed=0):
    """No tensor is left at zero or one, so that leaving any out shows."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        tensor.copy_(torch.empty_like(tensor).uniform_(-0.4, 0.4, generator=generator))
    return network.eval()


def random_tensors(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.empty(shape).uniform_(-0.4, 0.4, generator=generator) for name, shape in shapes.items()}


def embed(family, network, state, images=IMAGES):
    network.load_state_dict(family.adapt(state, network), strict=True)
    with torch.inference_mode():
        return network.eval()(images)


def assert_same(embedding, expected):
    assert embedding.shape == expected.shape
    assert expected.std() > 0.01
    torch.testing.assert_close(embedding, expected, rtol=1e-4, atol=1e-5)


# BiomedCLIP


def toy_biomedclip():
    return biomedclip.image_tower("test_vit", image_size=160, dim=16)


def biomedclip_checkpoint():
    trunk = with_random_weights(timm.create_model("test_vit", num_classes=0))
    visual = {f"visual.trunk.{name}": value for name, value in trunk.state_dict().items()}
    projection = random_tensors({"visual.head.proj.weight": (16, trunk.num_features)}, seed=1)
    text = {"text.transformer.embeddings.word_embeddings.weight": torch.ones(4, 4), "logit_scale": torch.ones(())}
    return trunk, {**visual, **projection, **text}


def test_biomedclip_projects_the_class_token_and_leaves_its_length(open_clip):
    trunk, state = biomedclip_checkpoint()
    images = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(2))

    embedding = embed(biomedclip, toy_biomedclip(), state, images)

    with torch.inference_mode():
        class_token = trunk.forward_features(images)[:, 0]  # (B, 64), behind the last norm
    assert_same(embedding, class_token @ state["visual.head.proj.weight"].T)


def test_without_open_clip_biomedclip_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.timm_model", None)  # Python's own way to make an import fail

    with pytest.raises(MissingWeights, match=r"pip install keyslice\[biomedclip\]"):
        biomedclip.build("biomedclip")


# SAM 2

HIERA = {"embed_dim": 8, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}  # channels 8, 16, 32, 64
OTHER_PARTS = (
    "memory_attention.layers.0.norm1.weight",
    "memory_encoder.fuser.layers.0.gamma",
    "sam_mask_decoder.iou_prediction_head.layers.0.weight",
    "sam_prompt_encoder.no_mask_embed.weight",
    "mask_downsample.weight",
    "obj_ptr_proj.layers.0.weight",
    "obj_ptr_tpos_proj.weight",
    "maskmem_tpos_enc",
    "no_mem_embed",
    "no_mem_pos_enc",
    "no_obj_ptr",
    "no_obj_embed_spatial",
)


def hiera():
    return with_random_weights(timm.create_model("sam2_hiera_tiny", num_classes=0, **HIERA))


def sam2_checkpoint(trunk):
    """As Meta publishes it: Hiera's MLP under other names, a neck of four convolutions, and the rest of SAM 2."""
    state = {
        "image_encoder.trunk." + name.replace("mlp.fc1", "mlp.layers.0").replace("mlp.fc2", "mlp.layers.1"): value
        for name, value in trunk.state_dict().items()
        if not name.startswith("head.")
    }
    for level, channels in enumerate((64, 32, 16, 8)):
        conv = f"image_encoder.neck.convs.{level}.conv"
        state |= random_tensors({f"{conv}.weight": (12, channels, 1, 1), f"{conv}.bias": (12,)}, seed=level)
    return state | {name: torch.ones(1) for name in OTHER_PARTS}


def block_means(trunk):
    """The mean over the map that each block puts out."""
    with torch.inference_mode():
        tokens = trunk._pos_embed(trunk.patch_embed(IMAGES))  # (B, 16, 16, 8)
        return [(tokens := block(tokens)).mean(dim=(1, 2)) for block in trunk.blocks]


def test_sam2_is_the_mean_over_the_trunks_last_map():
    trunk = hiera()

    from_meta = embed(sam2, sam2.SAM2Trunk("sam2_hiera_tiny", **HIERA), sam2_checkpoint(trunk))
    from_timm = embed(sam2, sam2.SAM2Trunk("sam2_hiera_tiny", **HIERA), trunk.state_dict())

    assert_same(from_meta, block_means(trunk)[-1])
    assert torch.equal(from_meta, from_timm)


def test_sam2s_neck_adds_its_two_coarsest_levels():
    trunk = hiera()
    state = sam2_checkpoint(trunk)

    embedding = embed(sam2, sam2.SAM2Neck("sam2_hiera_tiny", dim=12, **HIERA), state)

    *_, stride16, stride32 = block_means(trunk)  # repeating pixels and a 1x1 convolution leave a mean where it is
    expected = torch.zeros(2, 12)
    for level, mean in ((0, stride32), (1, stride16)):
        conv = f"image_encoder.neck.convs.{level}.conv"
        expected += mean @ state[f"{conv}.weight"][:, :, 0, 0].T + state[f"{conv}.bias"]
    assert_same(embedding, expected)


def test_timms_sam2_has_no_neck():
    network = sam2.SAM2Neck("sam2_hiera_tiny", dim=12, **HIERA)

    with pytest.raises(RuntimeError, match=r"Missing key.*lateral16"):
        embed(sam2, network, hiera().state_dict())


# MedSigLIP

SIGLIP_HIDDEN = 119  # DIM x 3.7362, SoViT's ratio, rounded down


def toy_siglip():
    return siglip.vision_tower(img_size=56, embed_dim=DIM, depth=DEPTH, num_heads=HEADS)


class TorchSigLIP(nn.Module):
    """SigLIP's image tower in torch's own layers (Zhai et al. 2023): pre-norm blocks, then attention of one query."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.ModuleDict(
            {"patch_embedding": nn.Conv2d(3, DIM, 14, stride=14), "position_embedding": nn.Embedding(16, DIM)}
        )
        blocks = (
            nn.TransformerEncoderLayer(
                DIM, HEADS, SIGLIP_HIDDEN, 0.0, tanh_gelu, 1e-6, batch_first=True, norm_first=True
            )
            for _ in range(DEPTH)
        )
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.post_layernorm = nn.LayerNorm(DIM, eps=1e-6)
        mlp = nn.ModuleDict({"fc1": nn.Linear(DIM, SIGLIP_HIDDEN), "fc2": nn.Linear(SIGLIP_HIDDEN, DIM)})
        attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.head = nn.ModuleDict({"attention": attention, "layernorm": nn.LayerNorm(DIM, eps=1e-6), "mlp": mlp})
        self.head.register_parameter("probe", nn.Parameter(torch.zeros(1, 1, DIM)))

    def forward(self, images):
        patches = self.embeddings["patch_embedding"](images).flatten(2).transpose(1, 2)  # (B, 16, DIM)
        tokens = patches + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"]:
            tokens = layer(tokens)
        tokens = self.post_layernorm(tokens)
        pooled, _ = self.head["attention"](self.head.probe.expand(len(images), -1, -1), tokens, tokens)  # (B, 1, DIM)
        hidden = tanh_gelu(self.head["mlp"]["fc1"](self.head["layernorm"](pooled)))
        return (pooled + self.head["mlp"]["fc2"](hidden))[:, 0]


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def siglip_checkpoint(reference):
    """As transformers writes it: the blocks' parts under other names, queries, keys and values apart."""
    state = {"text_model.head.weight": torch.ones(2), "logit_scale": torch.ones(1), "logit_bias": torch.ones(1)}
    for name, value in reference.state_dict().items():
        theirs = f"vision_model.{name}".replace(".norm", ".layer_norm").replace(".linear", ".mlp.fc")
        if ".self_attn.in_proj_" in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[theirs.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            state[theirs] = value
    return state


def test_medsiglip_pools_by_the_attention_of_one_query():
    reference = with_random_weights(TorchSigLIP())

    embedding = embed(siglip, toy_siglip(), siglip_checkpoint(reference), IMAGES[:, :, :56, :56])

    with torch.inference_mode():
        assert_same(embedding, reference(IMAGES[:, :, :56, :56]))


# DINOv3


def toy_dinov3():
    return dinov3.class_token_tower("vit_small_patch16_dinov3_qkvb", embed_dim=DIM, depth=DEPTH, num_heads=HEADS)


def dinov3_checkpoint():
    """As the authors publish it, but for keys' biases that are not zero: their mask must switch them off."""
    shapes = {
        "cls_token": (1, 1, DIM),
        "storage_tokens": (1, 4, DIM),
        "mask_token": (1, DIM),
        "local_cls_norm.weight": (DIM,),
        "patch_embed.proj.weight": (DIM, 3, 16, 16),
        "patch_embed.proj.bias": (DIM,),
        "rope_embed.periods": (DIM // HEADS // 4,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
    }
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}  # out and in, by DIM
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        for name, (out, into) in linear.items():
            shapes |= {f"{block}.{name}.weight": (out * DIM, into * DIM), f"{block}.{name}.bias": (out * DIM,)}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"{block}.{name}"] = (DIM,)
        shapes[f"{block}.attn.qkv.bias_mask"] = (3 * DIM,)
    return random_tensors(shapes)


def rotated(x, rows, columns):
    """Rotary positions (arXiv:2508.10104): patch centres in [-1, 1] by periods 100^(4i/d), halves of x in pairs."""
    width = x.shape[-1]
    periods = 100 ** (4 * torch.arange(width // 4) / width)
    centres = torch.cartesian_prod(*(2 * (torch.arange(n) + 0.5) / n - 1 for n in (rows, columns)))  # (patches, 2)
    angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1)  # (patches, width / 2)
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def dinov3_by_hand(state, images):
    def normed(x, name):
        return functional.layer_norm(x, (DIM,), state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-5)

    def mapped(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attended(x, name):
        bias = state[f"{name}.qkv.bias"].clone()
        bias[DIM : 2 * DIM] = 0  # keys have none
        queries, keys, values = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in (x @ state[f"{name}.qkv.weight"].T + bias).chunk(3, 2)
        )  # (B, HEADS, tokens, width)
        queries, keys = (torch.cat([part[:, :, :5], rotated(part[:, :, 5:], 4, 3)], dim=2) for part in (queries, keys))
        weights = (queries @ keys.transpose(2, 3) / math.sqrt(DIM // HEADS)).softmax(dim=-1)
        return mapped((weights @ values).transpose(1, 2).flatten(2), f"{name}.proj")

    patches = functional.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    special = torch.cat([state["cls_token"], state["storage_tokens"]], dim=1).expand(len(images), -1, -1)
    tokens = torch.cat([special, patches.flatten(2).transpose(1, 2)], dim=1)  # (B, 5 + 12, DIM)
    for block in (f"blocks.{index}" for index in range(DEPTH)):
        tokens = tokens + state[f"{block}.ls1.gamma"] * attended(normed(tokens, f"{block}.norm1"), f"{block}.attn")
        hidden = functional.gelu(mapped(normed(tokens, f"{block}.norm2"), f"{block}.mlp.fc1"))
        tokens = tokens + state[f"{block}.ls2.gamma"] * mapped(hidden, f"{block}.mlp.fc2")
    return normed(tokens, "norm")[:, 0]


TRANSFORMERS_BY_META = {
    "cls_token": "embeddings.cls_token",
    "storage_tokens": "embeddings.register_tokens",
    "mask_token": "embeddings.mask_token",
    "patch_embed.proj.": "embeddings.patch_embeddings.",
    "blocks.": "layer.",
    "attn.proj.": "attention.o_proj.",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.fc1.": "mlp.up_proj.",
    "mlp.fc2.": "mlp.down_proj.",
}


def as_transformers(state):
    theirs = {}
    for name, value in state.items():
        renamed = name
        for meta, transformers in TRANSFORMERS_BY_META.items():
            renamed = renamed.replace(meta, transformers)
        if ".attn.qkv." in name and not name.endswith("bias_mask"):
            parts = dict(zip("qkv", value.chunk(3), strict=True))
            if name.endswith(".bias"):
                del parts["k"]
            theirs |= {renamed.replace("attn.qkv", f"attention.{letter}_proj"): part for letter, part in parts.items()}
        elif not name.endswith(("bias_mask", "periods", "local_cls_norm.weight")):
            theirs[renamed] = value
    return theirs


def test_dinov3_is_the_class_token_behind_the_last_norm():
    state, images = dinov3_checkpoint(), IMAGES[:, :, :, :48]

    embedding = embed(dinov3, toy_dinov3(), state, images)

    assert_same(embedding, dinov3_by_hand(state, images))


def test_dinov3_is_the_same_from_transformers_and_from_timm():
    state, network = dinov3_checkpoint(), toy_dinov3()

    from_meta = embed(dinov3, network, state)

    assert torch.equal(from_meta, embed(dinov3, toy_dinov3(), as_transformers(state)))
    assert torch.equal(from_meta, embed(dinov3, toy_dinov3(), network.state_dict()))


def test_dinov3s_biases_do_not_vanish_in_a_network_without_them():
    network = dinov3.class_token_tower("vit_small_patch16_dinov3", embed_dim=DIM, depth=DEPTH, num_heads=HEADS)

    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_bias"):
        embed(dinov3, network, dinov3_checkpoint())


# All of them

CHECKPOINTS = {
    "biomedclip": (biomedclip, toy_biomedclip, lambda: biomedclip_checkpoint()[1], "visual.trunk.norm.bias"),
    "sam2": (
        sam2,
        lambda: sam2.SAM2Neck("sam2_hiera_tiny", dim=12, **HIERA),
        lambda: sam2_checkpoint(hiera()),
        "image_encoder.neck.convs.1.conv.bias",
    ),
    "siglip": (siglip, toy_siglip, lambda: siglip_checkpoint(TorchSigLIP()), "vision_model.head.probe"),
    "dinov3": (dinov3, toy_dinov3, dinov3_checkpoint, "blocks.1.ls2.gamma"),
}


@pytest.fixture(params=CHECKPOINTS)
def published(request):
    if request.param == "biomedclip":
        request.getfixturevalue("open_clip")
    family, network, checkpoint, tensor = CHECKPOINTS[request.param]
    return family, network(), checkpoint(), tensor


def test_a_missing_or_a_foreign_tensor_or_another_shape_does_not_fit(published):
    family, network, state, tensor = published
    network.load_state_dict(family.adapt(state, network), strict=True)

    for wrong in (
        {name: value for name, value in state.items() if name != tensor},
        {**state, "foreign.weight": torch.zeros(1)},
        {**state, tensor: torch.zeros(1)},
    ):
        with pytest.raises(RuntimeError, match=r"Missing key|Unexpected key|size mismatch"):
            network.load_state_dict(family.adapt(wrong, network), strict=True)


@pytest.mark.parametrize("family", [siglip, dinov3])
@pytest.mark.parametrize("letter", "qkv")
def test_queries_keys_and_values_of_unequal_shape_are_wrong_weights(family, letter):
    state = siglip_checkpoint(TorchSigLIP()) if family is siglip else as_transformers(dinov3_checkpoint())
    name = next(name for name in state if name.endswith(f".{letter}_proj.weight"))

    with pytest.raises(WrongWeights, match=r"q_proj\.weight"):
        family.adapt({**state, name: torch.zeros(1)}, nn.Module())


def test_exported_they_embed_the_same(published):
    family, network, state, _ = published
    pixels = {biomedclip: 160, siglip: 56}.get(family, 64)
    images = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(3))
    expected = embed(family, network, state, images)

    exported = torch.export.export(network, (images,)).module()

    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "network", "pixels", "dim", "millions"),
    [
        (biomedclip, "biomedclip", 224, 512, 86.2),
        (sam2, "sam2_hiera_tiny", 224, 768, 26.8),
        (sam2, "sam2_hiera_small", 224, 768, 33.9),
        (sam2, "sam2_hiera_base_plus", 224, 896, 68.7),
        (sam2, "sam2_hiera_large", 224, 1152, 212.1),
        (sam2, "sam2_hiera_tiny_neck", 224, 256, 27.1),
        (sam2, "sam2_hiera_large_neck", 224, 256, 212.6),
        (siglip, "medsiglip_448", 448, 1152, 428.6),
        (dinov3, "vit_small_patch16_dinov3_qkvb", 256, 384, 21.6),
        (dinov3, "vit_base_patch16_dinov3_qkvb", 256, 768, 85.7),
        (dinov3, "vit_large_patch16_dinov3_qkvb", 256, 1024, 303.1),
    ],
)
def test_the_published_networks_have_their_size_and_dimension(request, family, network, pixels, dim, millions):
    if family is biomedclip:
        request.getfixturevalue("open_clip")
    with torch.device("meta"):
        full = family.build(network).eval()
        embedding = full(torch.zeros(1, 3, pixels, pixels))

    assert embedding.shape == (1, dim)
    assert sum(parameter.numel() for parameter in full.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
