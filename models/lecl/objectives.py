"""What pretraining asks of a network: each objective's loss on one batch, from one pass over the views."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # what all of them are, the ones of several GPUs too

from models.lecl.config import BadConfig, Config, ObjectiveConfig
from models.lecl.delivery import base_encoder
from models.lecl.moco import MoCo, freeze_patch_stem, momentum_at
from models.lecl.networks import LOOKS, Backbone, backbone
from models.lecl.planting import Planting
from models.lecl.radlas import Projections, Restorer, discrimination_loss, grounding, reconstruction_loss
from models.lecl.views import Batch
from models.load import load_network
from models.specs import EncoderSpec
from models.zoo import LITE0


class Pretraining(nn.Module):
    """A backbone with the heads of the objectives that have a weight; the heads are thrown away afterwards."""

    def __init__(self, online: Backbone, config: ObjectiveConfig, frozen_norms: bool = False) -> None:
        super().__init__()
        self.backbone = online
        self._config, self._frozen_norms = config, frozen_norms
        self._asked = config.weights
        if self.contrasts:
            freeze_patch_stem(online)
            self.contrast = MoCo(online, config.temperature, config.projector_hidden)
        if self.restores:
            self.restorer = Restorer(online.channels)
        if "discrimination" in self._asked:
            self.projections = Projections(online.channels, online.dim)
        if "planting" in self._asked:
            self.planting = Planting(online.channels, online.dim, getattr(online.network, "evidence", None))

    @property
    def contrasts(self) -> bool:
        """Whether it looks at a batch's second views."""
        return "moco" in self._asked or "lecl" in self._asked

    @property
    def restores(self) -> bool:
        """Whether it looks at what a batch's slices were before planting."""
        return "reconstruction" in self._asked

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Each objective's loss by name, unweighted."""
        config, losses = self._config, {}
        map, embedding = self.backbone(batch.view)
        for name, weight in (("moco", 0.0), ("lecl", config.lecl_lambda)):
            if name in self._asked:
                losses[name] = self.contrast(embedding, batch.view, batch.other, batch.lesion, weight)
        if self.restores:
            restored = self.restorer(map, batch.view.shape[-1])  # (B, 1, S, S)
            losses["reconstruction"] = reconstruction_loss(restored, batch.healthy, batch.mask)
        if "discrimination" in self._asked:
            evidence = grounding(batch.view, restored)  # (B, 1, S, S)
            losses["discrimination"] = discrimination_loss(
                map, evidence, embedding, batch.lesion, config.temperature, self.projections
            )
        if "planting" in self._asked:
            losses["planting"] = self.planting(map, embedding, batch.mask, batch.lesion)
        return losses

    def after_step(self, progress: float) -> None:
        """The momentum encoder follows; `progress` is in [0, 1]."""
        if self.contrasts:
            constant = self._config.momentum_schedule == "constant"
            start = self._config.momentum
            self.contrast.update(start if constant else momentum_at(progress, start))

    def train(self, mode: bool = True) -> "Pretraining":
        """As ever, but norms that are frozen, all or with their block, keep their statistics, in both encoders."""
        super().train(mode)
        slow = self.contrast.momentum_backbone if self.contrasts else self.backbone
        for module, follower in zip(self.backbone.modules(), slow.modules(), strict=True):
            if isinstance(module, _BatchNorm) and (self._frozen_norms or not module.weight.requires_grad):
                module.eval()
                follower.eval()
        return self


def pretraining(config: Config, weights_dir: Path) -> Pretraining:
    """What the configuration asks for, at its start. Raises BadConfig, MissingWeights or WrongWeights."""
    encoder, base = config.encoder, base_encoder(config, weights_dir)
    _check(config, base)
    online = backbone(base, weights_dir if encoder.start == "pretrained" else None)
    if encoder.start == "trunk":
        _take_trunk(online.network, base, weights_dir)
    if encoder.frozen_blocks:
        _freeze(online.network, base, encoder.frozen_blocks)
    return Pretraining(online, config.objectives, encoder.frozen_norms)


def _check(config: Config, base: EncoderSpec) -> None:
    side, asked = config.views.crop or config.views.size, config.objectives.weights
    if base.family not in LOOKS:
        raise BadConfig(f"encoder.base: {base.name} is a {base.family}, expected one of {', '.join(LOOKS)}")
    if base.family == "vit_conv" and side != base.input_size:
        raise BadConfig(f"views: {side} px, but {base.name} takes {base.input_size} px alone")
    if "discrimination" in asked and "reconstruction" not in asked:
        raise BadConfig("objectives.discrimination: no weight for reconstruction, which finds what it contrasts")


def _take_trunk(network: Any, base: EncoderSpec, weights_dir: Path) -> None:
    """The ImageNet default's weights, where this network has the same layers."""
    if not hasattr(network, "take_trunk"):
        raise BadConfig(f'encoder.start: "trunk", but {base.name} has none, expected "pretrained" or "random"')
    network.take_trunk(load_network(LITE0, weights_dir))


def _freeze(network: Any, base: EncoderSpec, count: int) -> None:
    """An EfficientNet's stem and so many of its blocks."""
    stem = [getattr(network, name) for name in ("stem", "conv_stem", "bn1") if hasattr(network, name)]
    blocks = network.blocks if stem else ()
    if count > len(blocks):
        raise BadConfig(f"encoder.frozen_blocks: {count}, but {base.name} has {len(blocks) or 'no'} blocks to freeze")
    for frozen in (*stem, *blocks[:count]):
        frozen.requires_grad_(False)
