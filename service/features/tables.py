"""Arrow and Parquet: a row per slice and window."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from service.features.bags import FeatureBag
from service.features.outbox import Outbox
from service.storage.bags import slices_of

if TYPE_CHECKING:
    import pyarrow

LAYOUT_VERSION = 1
TEXTS = ("series_uid", "study_uid", "patient", "body_part", "manufacturer", "model", "kernel")
BYTES_PER_GROUP = 32 * 2**20  # of vectors, in a Parquet row group


def arrow(bags: Iterable[FeatureBag], about: dict[str, Any], dim: int, _scratch: Path) -> Iterator[bytes]:
    """An Arrow IPC stream, one record batch per series."""
    import pyarrow as pa

    outbox = Outbox()
    with pa.ipc.new_stream(outbox, schema(about, dim)) as writer:
        for bag in bags:
            writer.write_table(table(bag, about, dim))
            yield outbox.take()
    yield outbox.take()


def parquet(bags: Iterable[FeatureBag], about: dict[str, Any], dim: int, _scratch: Path) -> Iterator[bytes]:
    """A Parquet file; a row group holds the series that fit in BYTES_PER_GROUP, one at least."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    outbox, waiting, size = Outbox(), [], 0
    texts = [*TEXTS, "window", "receipt"]
    compression = {"vector.list.element": "NONE"} | dict.fromkeys([*texts, "slice", "frame", "z_mm", "sop_uid"], "ZSTD")
    form = schema(about, dim)
    with pq.ParquetWriter(
        outbox, form, use_dictionary=texts, compression=compression, write_statistics=texts
    ) as writer:
        for bag in bags:
            waiting.append(table(bag, about, dim))
            size += bag.vectors.nbytes
            if size >= BYTES_PER_GROUP:
                writer.write_table(pa.concat_tables(waiting))
                waiting, size = [], 0
                yield outbox.take()
        if waiting:
            writer.write_table(pa.concat_tables(waiting))
    yield outbox.take()


def schema(about: dict[str, Any], dim: int) -> "pyarrow.Schema":
    import pyarrow as pa

    fields = [(name, pa.string()) for name in TEXTS]
    fields += [("slice", pa.int32()), ("window", pa.string()), ("sop_uid", pa.string())]
    fields += [("frame", pa.int32()), ("z_mm", pa.float64())]
    fields += [("vector", pa.list_(pa.field("element", pa.float16()), dim)), ("receipt", pa.string())]
    return pa.schema(fields, metadata={"keyslice": json.dumps({"layout_version": LAYOUT_VERSION, **about})})


def table(bag: FeatureBag, about: dict[str, Any], dim: int) -> "pyarrow.Table":
    """The rows of one series; its first row carries the receipt."""
    import pyarrow as pa

    slices, windows, _ = bag.vectors.shape
    count = slices * windows
    form = schema(about, dim)
    columns = [pa.repeat(pa.scalar(getattr(bag, name)), count) for name in TEXTS]
    columns += [
        pa.array(np.repeat(np.arange(slices, dtype=np.int32), windows)),
        pa.array([*bag.windows] * slices),
        pa.array([uid for uid in bag.receipt["sop_uids"] for _ in bag.windows]),
        pa.array([each["frame"] for each in slices_of(bag.receipt) for _ in bag.windows], pa.int32()),
        pa.array(np.repeat(np.asarray(bag.receipt["z_mm"], np.float64), windows)),
        pa.FixedSizeListArray.from_arrays(pa.array(bag.vectors.reshape(-1)), type=form.field("vector").type),
        pa.array([json.dumps(bag.receipt), *[None] * (count - 1)], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=form)
