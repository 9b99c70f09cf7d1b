"""What is known of the index: its figures, and whether it is what the bags say."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from service.drift import embedding_health
from service.indexing import BAGS_PER_COMMIT, slice_rows
from service.storage.index import IndexBroken, one_of
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores


@dataclass(frozen=True)
class Checked:
    """What a check found. Rows are named `<series_uid>/<slice>/<window>`, where whole series lack, by their UID."""

    rows: int
    waiting: int  # bags that are not indexed yet
    differences: dict[str, list[str]]  # by kind: missing, extra, duplicate, differing, broken


def check_index(encoder_id: str, stores: Stores) -> Checked:
    """Every row that the catalog says is indexed, and no other, as its bag has it to the last bit."""
    found: dict[str, list[str]] = {kind: [] for kind in ("missing", "extra", "duplicate", "differing", "broken")}
    contents = stores.indexes.indexed_contents(encoder_id)
    waiting = sum(key.encoder_id == encoder_id for key, _ in stores.indexes.not_indexed(10**9))
    row = stores.indexes.get(encoder_id)
    if row is None or (not contents and not stores.index.exists(row.table_name)):
        return Checked(0, waiting, found)
    try:
        rows = stores.index.count(row.table_name)
        found["extra"] += sorted(stores.index.counts(row.table_name).keys() - contents.keys())
        uids = sorted(contents)
        for start in range(0, len(uids), BAGS_PER_COMMIT):
            part = uids[start : start + BAGS_PER_COMMIT]
            _compare(row.table_name, {uid: contents[uid] for uid in part}, encoder_id, stores, found)
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


def _compare(name: str, contents: dict[str, str], encoder_id: str, stores: Stores, found: dict[str, list[str]]) -> None:
    stored = stores.index.rows(name, one_of("series_uid", list(contents))).to_pylist()
    counts = Counter(each["row_id"] for each in stored)
    found["duplicate"] += sorted(row_id for row_id, count in counts.items() if count > 1)
    here = {each["row_id"]: each for each in stored}
    for uid, content in contents.items():
        try:
            bag = slice_rows(EmbeddingKey(uid, encoder_id), content, stores).as_table().to_pylist()
        except FileNotFoundError:  # replaced meanwhile: its new bag waits
            here = {row_id: each for row_id, each in here.items() if each["series_uid"] != uid}
            continue
        for expected in bag:
            mine = here.pop(expected["row_id"], None)
            if mine is None:
                found["missing"].append(expected["row_id"])
            elif mine != expected:
                found["differing"].append(expected["row_id"])
    found["extra"] += sorted(here)
