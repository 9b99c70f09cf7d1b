"""A file of an export: its name, and what its header said."""

import hashlib
from typing import NamedTuple

from models.ct.reasons import Reason


class ExportFile(NamedTuple):
    """Once identified, it has its series, or the reason why it is not used."""

    name: bytes  # below the export's root, as the file system has it
    size: int  # bytes
    place: int = 0  # where in an archive it begins
    series_uid: str = ""
    reason: Reason | None = None
    detail: str = ""

    def key(self) -> bytes:
        """Its name in an index: names may be longer than a database's index takes."""
        return hashlib.blake2b(b"%d\0%b" % (self.place, self.name), digest_size=16).digest()

    def aside(self, reason: Reason, detail: str, series_uid: str = "") -> "ExportFile":
        return self._replace(reason=reason, detail=detail, series_uid=series_uid or self.series_uid)
