"""A local directory as the place of a store's bytes."""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from models.durable import fsync_path, fsync_tree, remove_tree


class Folder:
    """See Objects."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def below(self, folder: str) -> "Folder":
        return Folder(self.root / folder)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(path.name for path in (self.root / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        return (self.root / name).exists()

    def changed_at(self, name: str) -> float | None:
        try:
            return (self.root / name).stat().st_mtime
        except FileNotFoundError:
            return None

    def size_bytes(self, folder: str) -> int:
        return sum(path.stat().st_size for path in (self.root / folder).rglob("*") if path.is_file())

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def read_part(self, name: str, start: int, length: int) -> bytes:
        with (self.root / name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def add_folder(self, folder: str, files: Mapping[str, bytes]) -> bool:
        """Written under a temporary name, flushed, renamed."""
        path = self.root / folder
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")
        for name, content in files.items():
            file = temporary / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        fsync_tree(temporary)
        *_, last = files
        if path.exists() and not (path / last).exists():  # what is left of a damaged one
            shutil.rmtree(path)
        try:
            temporary.rename(path)
        except OSError:  # another writer's came first
            shutil.rmtree(temporary)
            if not path.exists():
                raise
        self._flush(path.parent)
        return True

    def add_files(self, folder: str, files: Sequence[tuple[str, Path]]) -> list[bool]:
        """The link is made by one writer only, and the bytes are on disk before it."""
        path = self.root / folder
        path.mkdir(parents=True, exist_ok=True)
        added = [_moved(staged, path / name) for name, staged in files]
        self._flush(path)
        return added

    def replace_file(self, name: str, staged: Path) -> None:
        path = self.root / name
        fsync_path(staged)
        temporary = path.with_name(f".{uuid.uuid4().hex}")
        os.link(staged, temporary)
        temporary.replace(path)
        fsync_path(path.parent)

    @contextmanager
    def local(self, names: Sequence[str], staging_dir: Path) -> Iterator[list[Path]]:
        yield [self.root / name for name in names]

    def keeps_versions(self) -> bool:
        return False

    def remove(self, name: str) -> None:
        path = self.root / name
        if path.is_file():
            path.unlink(missing_ok=True)
        elif path.parent.is_dir():
            remove_tree(path)

    def _flush(self, path: Path) -> None:
        """A folder, and all above it up to the root."""
        fsync_path(path)
        while path != self.root:
            path = path.parent
            fsync_path(path)


def _moved(staged: Path, path: Path) -> bool:
    fsync_path(staged)
    try:
        os.link(staged, path)
    except FileExistsError:
        return False
    finally:
        staged.unlink()
    return True
