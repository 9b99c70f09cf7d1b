"""Weights from a hub, by pinned revision."""

import re
import shutil
from pathlib import Path

from models.specs import EncoderSpec, how_to_get

COMMIT = re.compile(r"[0-9a-f]{40}")


class CannotFetch(Exception):
    """The weights could not be fetched; the message says why."""


def fetch_weights(spec: EncoderSpec, revision: str, weights_dir: Path) -> Path:
    """Download the encoder's weights file at this commit; answers where it lies. Raises CannotFetch."""
    if spec.weights.source != "hub":
        raise CannotFetch(f"{spec.name} is not on a hub; {how_to_get(spec)}")
    if not COMMIT.fullmatch(revision):
        raise CannotFetch(f"revision is {revision!r}, expected a full commit of 40 hexadecimal digits")
    from huggingface_hub import hf_hub_download

    owner, repository, *file = spec.weights.locator.split("/", maxsplit=2)
    name = file[0] if file else "model.safetensors"
    try:
        downloaded = hf_hub_download(f"{owner}/{repository}", name, revision=revision)
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        raise CannotFetch(f"{spec.weights.locator} at {revision}: {type(error).__name__}: {error}") from error
    weights_dir.mkdir(parents=True, exist_ok=True)
    target = weights_dir / f"{spec.name}{Path(name).suffix}"
    partial = target.with_suffix(".part")
    shutil.copyfile(downloaded, partial)
    partial.rename(target)
    return target
