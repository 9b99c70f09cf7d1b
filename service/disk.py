"""Room on the data directory's disk: what comes in is refused before it is full, so that work in progress finishes."""

import errno
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from sqlalchemy.exc import DBAPIError

from service.errors import NoRoom
from service.settings import Settings


@dataclass(frozen=True)
class Room:
    """The disk of a folder, on which so much stays free."""

    folder: Path
    min_free_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(settings.data_dir, settings.min_free_bytes)

    def left(self) -> int:
        """Bytes that may still come."""
        return max(0, shutil.disk_usage(self.folder).free - self.min_free_bytes)

    def require(self, wanted_bytes: int = 0) -> None:
        """Raises NoRoom where less would stay free after so many bytes more."""
        free = shutil.disk_usage(self.folder).free
        if free - wanted_bytes < self.min_free_bytes:
            coming = f", and {wanted_bytes} are to come" if wanted_bytes else ""
            raise NoRoom(
                f"{free} bytes are free{coming}, expected {self.min_free_bytes} to stay free",
                free_bytes=free,
                wanted_bytes=wanted_bytes,
                min_free_bytes=self.min_free_bytes,
            )


def is_full(error: BaseException) -> bool:
    """Whether the disk was full, as the system or SQLite says it."""
    if isinstance(error, DBAPIError):
        return getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
