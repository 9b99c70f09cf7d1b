"""Slices that came to be searched by, on their way through a worker; nothing of them stays."""

import json
import uuid
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.errors import BadQuery


class Queries:
    """`<root>/<query_id>` from the API, `<query_id>.npy` or `<query_id>.json` from the worker; the API removes all."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, content: bytes) -> str:
        self._root.mkdir(parents=True, exist_ok=True)
        query_id = uuid.uuid4().hex
        self.path(query_id).write_bytes(content)
        return query_id

    def path(self, query_id: str) -> Path:
        """The file as it came."""
        return self._root / query_id

    def answer(self, query_id: str, embedding: NDArray[np.float32]) -> None:
        """(windows, dim)."""
        temporary = self._root / f"{query_id}.partial"
        with temporary.open("wb") as file:
            np.save(file, embedding)
        temporary.replace(self._root / f"{query_id}.npy")

    def refuse(self, query_id: str, reason: str) -> None:
        temporary = self._root / f"{query_id}.partial"
        temporary.write_text(json.dumps(reason))
        temporary.replace(self._root / f"{query_id}.json")

    def get(self, query_id: str) -> NDArray[np.float32] | None:
        """The worker's embedding, (windows, dim); None before. Raises BadQuery where it refused."""
        try:
            return np.asarray(np.load(self._root / f"{query_id}.npy"), np.float32)
        except FileNotFoundError:
            pass
        try:
            raise BadQuery(json.loads((self._root / f"{query_id}.json").read_text()))
        except FileNotFoundError:
            return None

    def forget(self, query_id: str) -> None:
        for name in (query_id, f"{query_id}.npy", f"{query_id}.json", f"{query_id}.partial"):
            (self._root / name).unlink(missing_ok=True)
