"""EfficientNet-Lite (Tan and Le 2019, arXiv:1905.11946, without squeeze-and-excitation and with ReLU6)."""

from torch import Tensor, nn

from models.encoders.timm_import import timm
from models.specs import WrongWeights


def build(network: str) -> nn.Module:
    """The network whose forward is (B, 3, H, W) -> (B, 1280), the mean over the last map."""
    return timm.create_model(network, num_classes=0)


def adapt(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The package's tensors under timm's names.

    Both list the same tensors in the same order under other names (`_blocks.0._bn1.weight`,
    `blocks.0.0.bn1.weight`), so they are paired in order and each pair's shape is checked. The
    package's classifier, its last two tensors, is dropped.
    """
    theirs = [(name, value) for name, value in state.items() if not name.endswith("num_batches_tracked")]
    ours = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    body = [(name, value) for name, value in theirs if not name.startswith("_fc.")]
    if len(body) != len(ours):
        raise WrongWeights(f"{len(body)} tensors, expected {len(ours)}")
    for (their_name, value), (name, expected) in zip(body, ours.items(), strict=True):
        if value.shape != expected.shape:
            raise WrongWeights(f"{their_name} is {tuple(value.shape)}, expected {tuple(expected.shape)} as {name}")
    # BatchNorm counts its training batches; evaluation never reads the count.
    counts = {name: value for name, value in network.state_dict().items() if name.endswith("num_batches_tracked")}
    return {name: value for name, (_, value) in zip(ours, body, strict=True)} | counts
