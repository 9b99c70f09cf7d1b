"""The formats that features leave in, by name and by the endings of files."""

from pathlib import Path
from typing import Literal

FormatName = Literal["parquet", "arrow", "stamp", "anndata", "zarr"]

SUFFIXES: dict[FormatName, str] = {
    "parquet": ".parquet",
    "arrow": ".arrows",
    "stamp": ".zip",
    "anndata": ".h5ad",
    "zarr": ".zarr.zip",
}


def format_of(path: Path) -> FormatName | None:
    """By the file's name, by its longest ending that is a format's; None where that says nothing."""
    named = sorted(SUFFIXES.items(), key=lambda item: -len(item[1]))
    return next((name for name, suffix in named if path.name.endswith(suffix)), None)
