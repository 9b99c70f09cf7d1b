"""LanceDB: tables of one row per slice and window, and their nearest neighbours."""

import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from service.errors import StorageUnreachable
from service.storage.keys import EmbeddingKey
from service.storage.lance_files import TableFiles

if TYPE_CHECKING:
    import lancedb
    import pyarrow

LAYOUT_VERSION = b"2"
KEEP_VERSIONS = timedelta(minutes=5)  # a query that began on an old version is long over by then
INDEX_CACHE_BYTES = 512 * 2**20  # the ANN index of two million rows
METADATA_CACHE_BYTES = 64 * 2**20
MARGIN = 8  # rows that rounding may have put behind the k-th
MANY_FRAGMENTS = 16
MANY_VERSIONS = 16
MANY_UNINDEXED = 4096  # rows that every query reads beside the ANN index

NARROWED_BY = ("series_uid", "window")
IDENTITY = ["series_uid", "slice", "window", "sop_uid", "frame", "z_mm", "patient_key", "study_uid"]


class IndexBroken(Exception):
    """The table is not there, or its files do not read."""


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

    def as_table(self) -> "pyarrow.Table":
        """The rows as they are stored, slice by slice."""
        import pyarrow as pa

        slices, windows, dim = self.bag.shape
        count = slices * windows
        slice_numbers = np.repeat(np.arange(slices, dtype=np.int32), windows)
        window_names = np.tile(np.array(self.windows), slices)
        names = zip(slice_numbers, window_names, strict=True)
        columns = {
            "row_id": pa.array([f"{self.key.series_uid}/{number}/{window}" for number, window in names]),
            "series_uid": pa.array([self.key.series_uid] * count),
            "slice": pa.array(slice_numbers),
            "window": pa.array(window_names),
            "sop_uid": pa.array(np.repeat(np.array(self.sop_uids), windows)),
            "frame": pa.array(np.repeat(np.array(self.frames or [None] * slices), windows), pa.int32()),
            "z_mm": pa.array(np.repeat(np.array(self.z_mm, dtype=np.float64), windows)),
            "patient_key": pa.array([self.patient_key] * count),
            "study_uid": pa.array([self.study_uid] * count),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(self.bag.reshape(-1)), dim),
        }
        return pa.table(columns).replace_schema_metadata({b"layout_version": LAYOUT_VERSION})


@dataclass(frozen=True)
class Effort:
    """How much of the ANN index a search looks at: partitions, and exact distances per hit asked for."""

    nprobes: int
    refine: int


class SliceIndex:
    """Lance tables; the catalog says which one an encoder's searches use (see Indexes).

    Derived from the bags. One writer at a time, which holds the lease. Whatever Lance cannot read raises
    IndexBroken. lancedb is imported where it is used: it takes a second and 100 MB, and must not be there
    before a fork.
    """

    def __init__(self, files: TableFiles) -> None:
        self._files = files
        self._lock = threading.Lock()
        self._connection: Any = None
        self._opened: dict[str, lancedb.table.Table] = {}

    @staticmethod
    def new_name(encoder_id: str) -> str:
        """A table name that was never used: an open handle never sees another table's files."""
        return f"slices-{encoder_id.replace('@', '-')}-{uuid.uuid4().hex[:8]}"

    def replace(self, name: str, bags: Sequence[SliceRows]) -> int:
        """In one commit, make these bags' rows the only ones of their series. Answers how many."""
        rows = _table(bags)
        with self._readable(name):
            if not self.exists(name):
                self._create(name, rows)
                return int(rows.num_rows)
            table, mine = self._open(name), one_of("series_uid", [bag.key.series_uid for bag in bags])
            (
                table.merge_insert("row_id")
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .when_not_matched_by_source_delete(mine)
                .execute(rows)
            )
            if table.count_rows(mine) != rows.num_rows:  # two writers' rows lie beside each other: a merge keeps both
                table.delete(mine)
                table.add(rows)
        return int(rows.num_rows)

    def append(self, name: str, bags: Sequence[SliceRows]) -> None:
        """Add bags to a table that has no row of their series: nothing has to be looked for."""
        rows = _table(bags)
        with self._readable(name):
            if self.exists(name):
                self._open(name).add(rows)
            else:
                self._create(name, rows)

    def remove(self, name: str, series_uids: Sequence[str]) -> None:
        with self._readable(name):
            self._open(name).delete(one_of("series_uid", series_uids))

    def erase(self, name: str, series_uids: Sequence[str], check: Callable[[], None]) -> None:
        """Remove the series' rows from the table's files, earlier versions and indexes too.

        Files that hold them, and files with rows deleted before, are written anew without; the ANN index is dropped.
        `check` is called before every commit. Dying in between does no harm: the next call finds the rest.
        """
        from lancedb.index import Bitmap

        theirs = one_of("series_uid", series_uids)
        with self._readable(name):
            table = self._open(name)
            found: Any = table.search().where(theirs).with_row_id(True).select(["_rowid"]).limit(None)
            pieces = {row >> 32 for row in found.to_arrow()["_rowid"].to_pylist()} | self._pieces_with_deleted(name)
            if pieces:
                ranges = (f"(_rowid >= {each << 32} AND _rowid < {(each + 1) << 32})" for each in sorted(pieces))
                check()
                table.update(where=f"({' OR '.join(ranges)}) AND NOT ({theirs})", values_sql={"slice": "slice"})
            check()
            table.delete(theirs)
            if not table.count_rows():
                self.drop(name)
                return
            for index in {each.name for each in table.list_indices() if each.columns == ["vector"]}:
                table.drop_index(index)
            for column in NARROWED_BY:  # a bitmap keeps the values of rows that are gone
                table.create_index(column, config=Bitmap(), replace=True)
            check()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that readers of older versions fail: they read again
                table.optimize(cleanup_older_than=timedelta(0), delete_unverified=True)

    def _pieces_with_deleted(self, name: str) -> set[int]:
        """Fragments with deleted rows, by the names of Lance's deletion files: `<fragment>-<version>-<id>.<kind>`."""
        return {int(each.partition("-")[0]) for each in self._files.deletions(name)}

    def nearest(
        self, name: str, vector: NDArray[Any], k: int, where: str | None = None, effort: Effort | None = None
    ) -> list[dict[str, Any]]:
        """The k rows of highest cosine among those that meet `where`, best first, with `score`.

        By exact search where no effort is given. An ANN search reads more partitions than its effort says where
        `where` leaves fewer than k rows in these, to the last one if need be. Lance rounds the query to float16,
        as the rows are: some rows more than k are asked for, and scored again by the query as it is.
        """
        single = vector.astype(np.float32)
        with self._readable(name):
            query: Any = self._open(name).search(single, vector_column_name="vector")
            query = query.distance_type("cosine").limit(k if effort else k + MARGIN)
            query = query.select([*IDENTITY, "vector", "_distance"])
            if effort is None:
                query = query.bypass_vector_index()
            else:
                query = query.minimum_nprobes(effort.nprobes).maximum_nprobes(0 if where else effort.nprobes)
                query = query.refine_factor(effort.refine)
            if where:
                query = query.where(where, prefilter=True)
            found: pyarrow.Table = query.to_arrow()
        scores = _cosines(found, single)
        best = np.argsort(-scores, kind="stable")[:k]
        rows = found.select([*IDENTITY]).take(best).to_pylist()
        return [{**row, "score": float(score)} for row, score in zip(rows, scores[best], strict=True)]

    def rows(self, name: str, where: str | None = None) -> "pyarrow.Table":
        """Whole rows, for checking them against the bags, or for other scores."""
        with self._readable(name):
            query: Any = self._open(name).search()
            return (query.where(where) if where else query).limit(None).to_arrow()

    def batches(self, name: str, columns: Sequence[str]) -> Iterator["pyarrow.RecordBatch"]:
        """Every row, some thousands at a time."""
        with self._readable(name):
            yield from self._open(name).search().select(list(columns)).limit(None).to_batches(batch_size=8192)

    def count(self, name: str, where: str | None = None) -> int:
        with self._readable(name):
            return int(self._open(name).count_rows(where))

    def counts(self, name: str) -> dict[str, int]:
        """How many rows each series has."""
        with self._readable(name):
            series = self._open(name).search().select(["series_uid"]).limit(None).to_arrow()["series_uid"]
            return {each["values"]: each["counts"] for each in series.value_counts().to_pylist()}

    def build(self, name: str) -> None:
        """Make the ANN index anew over every row; searches go on with the old one meanwhile."""
        from lancedb.index import IvfRq

        with self._readable(name):
            self._open(name).create_index("vector", config=IvfRq(distance_type="cosine"))

    def tidy(self, name: str) -> None:
        """Where it pays, merge small fragments, take new rows into the indexes, drop versions that nobody reads."""
        with self._readable(name):
            table = self._open(name)
            _index_columns(table)
            stats: Any = table.stats()
            pieces = stats["fragment_stats"]["num_small_fragments"] > MANY_FRAGMENTS
            if pieces or _behind(table) > MANY_UNINDEXED or len(table.list_versions()) > MANY_VERSIONS:
                table.optimize(cleanup_older_than=KEEP_VERSIONS)

    def settle(self, name: str) -> None:
        """Merge the fragments of a table that nobody reads yet, and take every row into its indexes."""
        with self._readable(name):
            self._open(name).optimize(cleanup_older_than=timedelta(milliseconds=1))

    def names(self) -> list[str]:
        """Of every table here, used or not."""
        return self._files.names()

    def exists(self, name: str) -> bool:
        return self._files.exists(name)

    def age_seconds(self, name: str, moment: float) -> float:
        """Since the table was last written."""
        return moment - self._files.changed_at(name)

    def size_bytes(self, name: str) -> int:
        return self._files.size_bytes(name)

    def drop(self, name: str) -> None:
        with self._lock:
            self._opened.pop(name, None)
        self._files.drop(name)

    def _create(self, name: str, rows: "pyarrow.Table") -> None:
        _index_columns(self._connect().create_table(name, data=rows))

    def _open(self, name: str) -> "lancedb.table.Table":
        if name not in self._opened:
            self._opened[name] = self._connect().open_table(name)
        return self._opened[name]

    def _connect(self) -> Any:
        import lancedb

        with self._lock:
            if self._connection is None:
                place, options = self._files.connection()
                session = lancedb.Session(INDEX_CACHE_BYTES, METADATA_CACHE_BYTES)
                # Zero: every read looks whether there is a newer version.
                always = timedelta(0)
                self._connection = lancedb.connect(
                    place, read_consistency_interval=always, storage_options=options, session=session
                )
            return self._connection

    @contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        """Lance's errors are of no class of its own."""
        try:
            yield
        except StorageUnreachable:
            raise
        except (RuntimeError, OSError, ValueError) as error:
            self._opened.pop(name, None)
            self._files.reached(error)
            raise IndexBroken(f"table {name}: {type(error).__name__}") from error


def _table(bags: Sequence[SliceRows]) -> "pyarrow.Table":
    import pyarrow as pa

    return pa.concat_tables([bag.as_table() for bag in bags])


def _behind(table: "lancedb.table.Table") -> int:
    """The most rows that one of the indexes lacks, and every search that uses it reads one by one."""
    stats = [table.index_stats(index.name) for index in table.list_indices()]
    return max((each.num_unindexed_rows for each in stats if each), default=0)


def _cosines(found: "pyarrow.Table", query: NDArray[np.float32]) -> NDArray[np.float32]:
    vectors = np.asarray(found["vector"].combine_chunks().flatten()).reshape(len(found), len(query)).astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(query)
    return np.asarray(vectors @ query / np.where(lengths, lengths, np.float32(1.0)))


def _index_columns(table: "lancedb.table.Table") -> None:
    """Those that searches narrow by, where they have no index yet: whoever made the table may have died."""
    from lancedb.index import Bitmap

    present = {column for index in table.list_indices() for column in index.columns}
    for column in NARROWED_BY:
        if column not in present:
            table.create_index(column, config=Bitmap())


def one_of(column: str, values: Sequence[str]) -> str:
    """An SQL condition; Lance takes no bound parameters."""
    return f"{column} IN ({', '.join(map(quoted, values))})"


def quoted(value: str) -> str:
    """An SQL string literal."""
    return "'" + value.replace("'", "''") + "'"
