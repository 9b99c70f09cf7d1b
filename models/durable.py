"""Writes and removals that survive a power cut."""

import os
import shutil
from pathlib import Path

TRIES = 5  # at a directory that somebody still writes into


def fsync_path(path: Path) -> None:
    """Flush a file's bytes, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(root: Path) -> None:
    """Flush every file and directory below root, and root."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))


def remove_tree(folder: Path) -> None:
    """Delete a directory for good, also where somebody is just writing into it."""
    for left in reversed(range(TRIES)):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                break
        except OSError:  # not empty: a file came after its directory was listed
            if not left:
                raise
    if folder.parent.exists():
        fsync_path(folder.parent)
