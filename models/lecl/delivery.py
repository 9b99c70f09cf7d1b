"""What a run leaves to the service: its network as an encoder, with a card that says how it came to be."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from models.ct.windows import WINDOWS
from models.lecl.card import Trained
from models.lecl.config import BadConfig, Config
from models.lecl.export import export_encoder
from models.lecl.sources import Source
from models.specs import EncoderSpec
from models.zoo import encoders


def base_encoder(config: Config, weights_dir: Path) -> EncoderSpec:
    """The encoder whose network is trained. Raises BadConfig where there is none of that name."""
    known = encoders(weights_dir)
    if config.encoder.base not in known:
        raise BadConfig(f"encoder.base: no encoder {config.encoder.base!r}, expected one of {', '.join(known)}")
    return known[config.encoder.base]


def deliver(
    config: Config, name: str, network: nn.Module, source: Source, steps: int, command: str, weights_dir: Path
) -> EncoderSpec:
    """Export `network`, which has the base encoder's architecture, under this name. Raises as export_encoder does."""
    encoder, views = config.encoder, config.views
    changes: dict[str, Any] = {
        "input_size": views.size,
        "windows": tuple(WINDOWS[window] for window in views.windows),
    }
    if encoder.licence:
        changes |= {"licence": encoder.licence, "commercial_use": encoder.commercial_use}
    trained = Trained(
        objectives=config.objectives.weights,
        data=_data(config, source),
        attribution=config.data.attribution,
        steps=steps,
        command=command,
        versions={package: version(package) for package in ("keyslice", "torch", "timm")},
        figures={},
    )
    base = base_encoder(config, weights_dir)
    return export_encoder(
        network.state_dict(), base, name=name, changes=changes, trained=trained, weights_dir=weights_dir
    )


def _data(config: Config, source: Source) -> str:
    """Counts alone: a card goes where patients' keys must not."""
    data = config.data
    left_out = f"{len(data.leave_out_patients)} patients" if data.leave_out_patients else ""
    fold = f"fold {data.fold} of {data.folds}" if data.folds else ""
    without = " and ".join(filter(None, [left_out, fold]))
    counts = f"{len(source)} slices of {len(set(source.patients))} patients"
    return f"{data.description} {counts}; left out: {without or 'nobody'}.".strip()
