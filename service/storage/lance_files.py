"""Where Lance's tables lie, as files of a directory or objects of a bucket: what is asked of them without Lance."""

import shutil
from pathlib import Path
from typing import Protocol

from service.errors import StorageUnreachable
from service.storage.objects import Objects

AWAY = 'Generic { store: "S3"', "Generic S3 error"  # how the library below Lance calls a server that does not answer
BEYOND = "416"  # an object that is shorter than the table says
RETRIES = {"client_max_retries": "3", "client_retry_timeout": "30", "connect_timeout": "5s"}


class TableFiles(Protocol):
    """A table is `<name>.lance`."""

    def connection(self) -> tuple[str | Path, dict[str, str] | None]:
        """What lancedb connects to, and its storage options."""
        ...

    def names(self) -> list[str]: ...

    def exists(self, name: str) -> bool: ...

    def deletions(self, name: str) -> list[str]:
        """Names of the table's deletion files."""
        ...

    def changed_at(self, name: str) -> float:
        """When the table was last written, in seconds of time.time()."""
        ...

    def size_bytes(self, name: str) -> int: ...

    def drop(self, name: str) -> None: ...

    def reached(self, error: Exception) -> None:
        """Raises StorageUnreachable where Lance's error is not the table's fault."""
        ...


class LocalTables:
    """See TableFiles."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def connection(self) -> tuple[str | Path, dict[str, str] | None]:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root, None

    def names(self) -> list[str]:
        return sorted(path.stem for path in self.root.glob("*.lance"))

    def exists(self, name: str) -> bool:
        return self._path(name).exists()

    def deletions(self, name: str) -> list[str]:
        return [path.name for path in (self._path(name) / "_deletions").glob("*-*")]

    def changed_at(self, name: str) -> float:
        return max((path.stat().st_mtime for path in self._path(name).iterdir()), default=0.0)

    def size_bytes(self, name: str) -> int:
        return sum(path.stat().st_size for path in self._path(name).rglob("*") if path.is_file())

    def drop(self, name: str) -> None:
        shutil.rmtree(self._path(name), ignore_errors=True)

    def reached(self, error: Exception) -> None:
        return

    def _path(self, name: str) -> Path:
        return self.root / f"{name}.lance"


class BucketTables:
    """See TableFiles."""

    def __init__(self, objects: Objects, uri: str, options: dict[str, str]) -> None:
        self._objects = objects
        self._uri = uri
        self._options = options

    def connection(self) -> tuple[str | Path, dict[str, str] | None]:
        return self._uri, self._options | RETRIES

    def names(self) -> list[str]:
        return [name.removesuffix(".lance") for name in self._objects.names() if name.endswith(".lance")]

    def exists(self, name: str) -> bool:
        return bool(self._objects.names(f"{name}.lance"))

    def deletions(self, name: str) -> list[str]:
        return [each for each in self._objects.names(f"{name}.lance/_deletions") if "-" in each]

    def changed_at(self, name: str) -> float:
        return self._objects.changed_at(f"{name}.lance") or 0.0

    def size_bytes(self, name: str) -> int:
        return self._objects.size_bytes(f"{name}.lance")

    def drop(self, name: str) -> None:
        self._objects.remove(f"{name}.lance")

    def reached(self, error: Exception) -> None:
        self._objects.names()
        if any(each in str(error) for each in AWAY) and BEYOND not in str(error):
            raise StorageUnreachable("the object store does not answer Lance") from error
