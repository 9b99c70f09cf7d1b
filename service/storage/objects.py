"""Bytes under names: what a local directory and a prefix of an S3 bucket both do for the stores."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Objects(Protocol):
    """A name's parts stand between slashes; what is above its last part is a folder. Names come from us, never from a
    caller. Shared by threads."""

    def below(self, folder: str) -> "Objects":
        """What lies in a folder, as objects of its own."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """Of what lies in the folder, folders too, in their order; of a folder that is not there nothing."""
        ...

    def exists(self, name: str) -> bool: ...

    def changed_at(self, name: str) -> float | None:
        """When the object, or anything in the folder, came last, in seconds of time.time(); None where it is gone."""
        ...

    def size_bytes(self, folder: str) -> int:
        """Of everything in the folder."""
        ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def read_part(self, name: str, start: int, length: int) -> bytes:
        """Raises FileNotFoundError."""
        ...

    def add_folder(self, folder: str, files: Mapping[str, bytes]) -> bool:
        """Make a folder of these files, durable when this answers; while the last of them is not there, none counts.

        A folder that is there stays. False where files of another writer, alive or dead, are in the place of ours.
        """
        ...

    def add_files(self, folder: str, files: Sequence[tuple[str, Path]]) -> list[bool]:
        """Move files into a folder under their names, durable when this answers. False where there is one of the name
        already, which stays: of two writers at once one is first."""
        ...

    def replace_file(self, name: str, staged: Path) -> None:
        """The object is as the staged file is, at one moment; the file stays."""
        ...

    def local(self, names: Sequence[str], staging_dir: Path) -> AbstractContextManager[list[Path]]:
        """The objects as files, as long as the block lasts; what is not there has a path without a file."""
        ...

    def keeps_versions(self) -> bool:
        """Whether what is removed stays as an earlier version."""
        ...

    def remove(self, name: str) -> None:
        """The object, or all of the folder, for good."""
        ...
