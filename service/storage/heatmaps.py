"""Heat maps that workers made: `<root>/<series_uid>/<spot>.json`, derived and free to delete."""

import hashlib
import json
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.durable import fsync_path, remove_tree
from service.storage.keys import HeatSpot


class HeatMaps:
    """Written by workers, read by the API. Another version of the code makes them anew."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def get(self, spot: HeatSpot) -> dict[str, Any] | None:
        """What a worker put; None before."""
        try:
            found: dict[str, Any] = json.loads(self._path(spot).read_text())
        except FileNotFoundError:
            return None
        return found

    def put(self, spot: HeatSpot, found: dict[str, Any]) -> None:
        """Write under a temporary name, flush, rename: a reader sees all of it or nothing."""
        path = self._path(spot)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        temporary.write_text(json.dumps(found))
        fsync_path(temporary)
        temporary.replace(path)

    def series(self) -> list[str]:
        """Of which there are any."""
        return sorted(path.name for path in self._root.iterdir())

    def count(self, series_uid: str) -> int:
        return sum(1 for _ in (self._root / series_uid).glob("*.json"))

    def remove(self, series_uid: str) -> None:
        """Every heat map of the series."""
        remove_tree(self._root / series_uid)

    def _path(self, spot: HeatSpot) -> Path:
        # A label may be any text, so the name is a digest.
        what = "\n".join((version("keyslice"), *spot.words()))
        return self._root / spot.series_uid / f"{hashlib.sha256(what.encode()).hexdigest()[:32]}.json"
