"""LanceDB: one row per slice and window, and its nearest neighbours."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.storage.keys import EmbeddingKey

if TYPE_CHECKING:
    import lancedb
    import pyarrow

LAYOUT_VERSION = b"1"
FRAME = "frame"
KEEP_VERSIONS = timedelta(hours=1)  # a reader that opened an old version may still be on it


@dataclass(frozen=True)
class SliceRows:
    """What the index stores of one bag."""

    key: EmbeddingKey
    patient_key: str
    study_uid: str
    sop_uids: Sequence[str]  # (slices,)
    z_mm: Sequence[float]  # (slices,)
    windows: Sequence[str]  # (windows,)
    bag: NDArray[np.float16]  # (slices, windows, dim)
    frames: Sequence[int | None] | None = None  # (slices,), of multi-frame instances


class SliceIndex:
    """One Lance table per encoder below `root`. Derived from the bags; one writer at a time (see leases).

    lancedb is imported where it is used: it takes a second and 100 MB, and must not be there before a fork.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def replace(self, encoder_id: str, bags: Sequence[SliceRows]) -> None:
        """In one commit, make these bags' rows the only ones of their series."""
        import pyarrow as pa

        rows = pa.concat_tables([_rows(bag) for bag in bags])
        table = self._table(encoder_id, rows.schema)
        series = ", ".join(f"'{bag.key.series_uid}'" for bag in bags)  # UIDs: digits and dots
        (
            table.merge_insert("row_id")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .when_not_matched_by_source_delete(f"series_uid IN ({series})")
            .execute(rows)
        )

    def nearest(self, encoder_id: str, vector: NDArray[Any], k: int, where: str | None) -> list[dict[str, Any]]:
        """The k rows of highest cosine among those that meet `where`, by exact search; best first."""
        table = self._open(encoder_id)
        if table is None or table.count_rows() == 0:
            return []
        query: Any = table.search(vector.astype(np.float32), vector_column_name="vector")
        query = query.distance_type("cosine").bypass_vector_index().limit(k)
        columns = [column for column in _columns() if column in table.schema.names]  # an older table has no frames
        query = query.select([*columns, "_distance"])
        if where:
            query = query.where(where, prefilter=True)
        hits: list[dict[str, Any]] = query.to_list()
        return hits

    def tidy(self, encoder_id: str) -> None:
        """Merge small fragments and drop versions that no reader can be on."""
        if table := self._open(encoder_id):
            table.optimize(cleanup_older_than=KEEP_VERSIONS)

    def rows(self, encoder_id: str) -> "pyarrow.Table":
        """Everything in the index, for checking it against the bags."""
        table = self._open(encoder_id)
        if table is None:
            raise KeyError(encoder_id)
        return table.to_arrow()

    def _table(self, encoder_id: str, schema: "pyarrow.Schema") -> "lancedb.table.Table":
        existing = self._open(encoder_id)
        if existing is not None:
            if FRAME not in existing.schema.names:
                existing.add_columns({FRAME: "CAST(NULL AS INT)"})
            return existing
        from lancedb.index import Bitmap, BTree

        table = self._connect().create_table(_name(encoder_id), schema=schema)
        table.create_index("series_uid", config=BTree())
        table.create_index("window", config=Bitmap())
        return table

    def _open(self, encoder_id: str) -> "lancedb.table.Table | None":
        if not (self._root / f"{_name(encoder_id)}.lance").exists():
            return None
        return self._connect().open_table(_name(encoder_id))

    def _connect(self) -> "lancedb.DBConnection":
        import lancedb

        self._root.mkdir(parents=True, exist_ok=True)
        return lancedb.connect(self._root)


def _name(encoder_id: str) -> str:
    """Table names hold letters, digits, dots, hyphens and underscores only."""
    return f"slices-{encoder_id.replace('@', '-')}"


def _columns() -> list[str]:
    return ["series_uid", "slice", "window", "sop_uid", FRAME, "z_mm", "patient_key", "study_uid"]


def _rows(bag: SliceRows) -> "pyarrow.Table":
    import pyarrow as pa

    slices, windows, dim = bag.bag.shape
    count = slices * windows
    slice_numbers = np.repeat(np.arange(slices, dtype=np.int32), windows)
    window_names = np.tile(np.array(bag.windows), slices)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(bag.bag.reshape(-1)), dim)
    columns = {
        "row_id": pa.array([f"{bag.key.series_uid}/{k}/{w}" for k, w in zip(slice_numbers, window_names, strict=True)]),
        "series_uid": pa.array([bag.key.series_uid] * count),
        "slice": pa.array(slice_numbers),
        "window": pa.array(window_names),
        "sop_uid": pa.array(np.repeat(np.array(bag.sop_uids), windows)),
        FRAME: pa.array(np.repeat(np.array(bag.frames or [None] * slices), windows), pa.int32()),
        "z_mm": pa.array(np.repeat(np.array(bag.z_mm, dtype=np.float64), windows)),
        "patient_key": pa.array([bag.patient_key] * count),
        "study_uid": pa.array([bag.study_uid] * count),
        "vector": vectors,
    }
    return pa.table(columns).replace_schema_metadata({b"layout_version": LAYOUT_VERSION})
