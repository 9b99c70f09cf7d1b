"""What is known of the index: its figures, and whether it is what the bags say."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from service.drift import embedding_health
from service.errors import Damaged, SeriesNotFound
from service.indexing import BAGS_PER_COMMIT, slice_rows
from service.storage.index import IndexBroken, one_of
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

DIFFERING = ("missing", "extra", "duplicate", "differing")  # how rows may


@dataclass(frozen=True)
class Checked:
    """What a check found. Rows are named `<series_uid>/<slice>/<window>`, where whole series lack, by their UID."""

    rows: int
    waiting: int  # bags that are not indexed yet
    differences: dict[str, list[str]]  # by kind: missing, extra, duplicate, differing, broken


def check_index(encoder_id: str, stores: Stores) -> Checked:
    """Every row that the catalog says is indexed, and no other, as its bag has it to the last bit."""
    found: dict[str, list[str]] = {kind: [] for kind in (*DIFFERING, "broken")}
    waiting = stores.inspection.waiting_for_index().get(encoder_id, 0)
    row = stores.indexes.get(encoder_id)
    if row is None or not (stores.indexes.rows(encoder_id) or stores.index.exists(row.table_name)):
        return Checked(0, waiting, found)
    try:
        rows = stores.index.count(row.table_name)
        found["extra"] += sorted(unknown_series(row.table_name, encoder_id, stores))
        for contents in stores.inspection.indexed(encoder_id, BAGS_PER_COMMIT):
            for kind, names in compare(row.table_name, contents, encoder_id, stores).items():
                found[kind] += names
    except IndexBroken as error:
        found["broken"].append(str(error))
        return Checked(0, waiting, found)
    return Checked(rows, waiting, found)


def index_stats(stores: Stores) -> list[dict[str, Any]]:
    """Per encoder: how much there is and waits, what the ANN index was measured to find, how embeddings change."""
    waiting = Counter(key.encoder_id for key, _ in stores.indexes.not_indexed(10**9))
    found = []
    for encoder_id in stores.indexes.encoders():
        row = stores.indexes.get(encoder_id)
        there = row is not None and stores.index.exists(row.table_name)
        expected = stores.indexes.expected(encoder_id)
        found.append(
            {
                "encoder_id": encoder_id,
                "table": row and row.table_name,
                "broken": row is not None and (row.broken or (bool(expected) and not there)),
                "series": len(expected),
                "rows": sum(expected.values()),
                "waiting": waiting[encoder_id],
                "bytes": stores.index.size_bytes(row.table_name) if row and there else 0,
                "built_rows": row and row.built_rows,
                "built_at": row and row.built_at and row.built_at.isoformat(),
                "build_seconds": row and row.build_seconds,
                "recall": row and row.recall,
                "effort": {"nprobes": row.nprobes, "refine": row.refine} if row and row.nprobes else None,
                "measured": row and row.measured,
                "health": embedding_health(encoder_id, stores),
            }
        )
    return found


def compare(name: str, contents: Mapping[str, str], encoder_id: str, stores: Stores) -> dict[str, list[str]]:
    """The rows of some series that are not as the bags of these contents have them, by how they differ.

    Bags that are gone are left out: they were replaced, and the new ones wait. So are those that do not read: of them
    `keyslice check` speaks.
    """
    found: dict[str, list[str]] = {kind: [] for kind in DIFFERING}
    stored = stores.index.rows(name, one_of("series_uid", list(contents))).to_pylist() if contents else []
    counts = Counter(each["row_id"] for each in stored)
    found["duplicate"] += sorted(row_id for row_id, count in counts.items() if count > 1)
    here = {each["row_id"]: each for each in stored}
    for uid, content in contents.items():
        try:
            bag = slice_rows(EmbeddingKey(uid, encoder_id), content, stores).as_table().to_pylist()
        except (FileNotFoundError, SeriesNotFound, Damaged):
            here = {row_id: each for row_id, each in here.items() if each["series_uid"] != uid}
            continue
        for expected in bag:
            mine = here.pop(expected["row_id"], None)
            if mine is None:
                found["missing"].append(expected["row_id"])
            elif mine != expected:
                found["differing"].append(expected["row_id"])
    found["extra"] += sorted(here)
    return found


def unknown_series(name: str, encoder_id: str, stores: Stores) -> Iterator[str]:
    """Series that have rows in the table, and none by the catalog."""
    told = set[str]()
    for batch in stores.index.batches(name, ["series_uid"]):
        uids = set(batch["series_uid"].unique().to_pylist()) - told
        unknown = uids - stores.inspection.indexed_of(encoder_id, uids).keys()
        told |= unknown
        yield from sorted(unknown)
