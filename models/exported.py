"""The encoders that were exported into the weights directory, each a folder with its spec beside its weights."""

import json
import logging
import re
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from models.specs import EncoderSpec

SPEC_FILE, WEIGHTS_FILE, CARD_FILE = "spec.json", "model.safetensors", "MODEL_CARD.md"
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")  # it becomes a folder, a part of ids, and a part of a table's name
RESERVED = {"compiled"}  # a folder that the weights directory has anyway

log = logging.getLogger(__name__)


class BadSpec(Exception):
    """A spec file is not what an export writes; the message names the file and what differs."""


@dataclass(frozen=True)
class SpecFile:
    """The content of spec.json. Another field of EncoderSpec is another schema version."""

    schema_version: Literal[1]
    encoder: EncoderSpec


FORMAT = TypeAdapter(SpecFile)


def exported(weights_dir: Path) -> dict[str, EncoderSpec]:
    """The encoders exported into this directory, by name. A broken spec is logged, once, and left out."""
    found = {}
    for path in sorted(weights_dir.glob(f"*/{SPEC_FILE}")):
        try:
            status = path.stat()
        except OSError:  # gone since, or not for us
            continue
        if spec := _listed(path, status.st_mtime_ns, status.st_size):
            found[spec.name] = spec
    return found


def write_spec(spec: EncoderSpec) -> bytes:
    """What read_spec() reads."""
    return json.dumps(asdict(SpecFile(1, spec)), indent=1).encode()


def read_spec(path: Path) -> EncoderSpec:
    """The spec in `<name>/spec.json`. Raises BadSpec where a field is missing, unknown, or of another type."""
    try:
        content = path.read_bytes()
        file = FORMAT.validate_json(content, strict=True)
    except OSError as error:
        raise BadSpec(f"{_named(path)}: {error.strerror}") from error
    except ValidationError as error:
        said = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
        raise BadSpec(f"{_named(path)}: {'; '.join(said)}") from error
    expected, present = _fields(asdict(file)), _fields(from_json(content))
    if differing := [
        *(f"{field}: missing" for field in sorted(expected - present)),
        *(f"{field}: unknown" for field in sorted(present - expected)),
    ]:
        raise BadSpec(f"{_named(path)}: {'; '.join(differing)}")
    if wrong := _wrong(file.encoder, path.parent.name):
        raise BadSpec(f"{_named(path)}: {wrong}")
    return file.encoder


def _wrong(spec: EncoderSpec, folder: str) -> str | None:
    """What of a spec does not belong into this folder."""
    families = sorted(path.stem for path in (Path(__file__).parent / "encoders").glob("[a-z]*.py"))
    if not NAME.fullmatch(folder) or spec.name != folder:
        return f"the encoder is named {spec.name!r}, expected its folder's name, of the form {NAME.pattern}"
    if (spec.weights.source, spec.weights.locator) != ("export", f"{folder}/{WEIGHTS_FILE}"):
        return f"its weights are {spec.weights.source} {spec.weights.locator}, expected export {folder}/{WEIGHTS_FILE}"
    if spec.weights.sha256 is None:
        return "its weights have no SHA-256"
    if spec.family not in families:
        return f"its family is {spec.family!r}, expected one of {', '.join(families)}"
    return None


def _fields(value: Any, at: str = "") -> set[str]:
    """The paths of all that JSON or a dataclass's dictionary holds, such as `encoder.windows.0.low`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {at}.union(*(_fields(each, f"{at}.{name}".lstrip(".")) for name, each in inside))


def _named(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


@lru_cache(maxsize=256)
def _listed(path: Path, _mtime_ns: int, _size: int) -> EncoderSpec | None:
    try:
        return read_spec(path)
    except BadSpec as error:
        log.warning("an encoder is left out: %s", error)
        return None
