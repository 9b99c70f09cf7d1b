"""The formats that features leave in."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.features.anndata import h5ad
from service.features.bags import FeatureBag
from service.features.names import SUFFIXES, FormatName
from service.features.stamp import stamp_zip
from service.features.tables import arrow, parquet
from service.features.zarr_zip import zarr_zip


@dataclass(frozen=True)
class Format:
    media_type: str
    suffix: str
    # Of the bags, what is said of them all (JSON), the dimension of a vector and a folder for what cannot be sent on
    # at once: the file, piece by piece.
    write: Callable[[Iterable[FeatureBag], dict[str, Any], int, Path], Iterator[bytes]]


FORMATS: dict[FormatName, Format] = {
    "parquet": Format("application/vnd.apache.parquet", SUFFIXES["parquet"], parquet),
    "arrow": Format("application/vnd.apache.arrow.stream", SUFFIXES["arrow"], arrow),
    "stamp": Format("application/zip", SUFFIXES["stamp"], stamp_zip),
    "anndata": Format("application/x-hdf5", SUFFIXES["anndata"], h5ad),
    "zarr": Format("application/zip", SUFFIXES["zarr"], zarr_zip),
}
