"""The life of the index: what is embedded goes in, what does not fit is mended, ANN indexes are built and measured."""

import logging
import time
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from models.health import bag_health
from service.errors import Damaged, SeriesNotFound
from service.recall import draw_probes, measure_recall
from service.settings import Settings
from service.storage.index import IndexBroken, SliceRows
from service.storage.indexes import Indexed, Measured
from service.storage.inspection import LOST_BAG
from service.storage.keys import EmbeddingKey
from service.storage.leases import Held, LeaseLost
from service.storage.stores import Stores
from service.storage.tables import IndexRow

LEASE = "index"
LEASE_SECONDS = 60.0  # kept alive by its holder; after a holder's death the next one waits as long
BAGS_PER_COMMIT = 64
GROWTH = 1.5  # of the rows since the ANN index was built, at which it is built anew
UNUSED_SECONDS = 600.0  # a table that no search was sent to for so long is dropped

log = logging.getLogger(__name__)


def index_bags(stores: Stores, settings: Settings, holder: str) -> None:
    """Bring the index up to what is embedded. One writer does it for all; the others go on."""
    with stores.leases.hold(LEASE, holder, LEASE_SECONDS) as held:
        while held and _index_some(stores, settings, held):
            pass


def keep_index(stores: Stores, settings: Settings, holder: str) -> None:
    """Mend what is not as the catalog says, take in what waits, build what has grown, drop what is unused."""
    with stores.leases.hold(LEASE, holder, LEASE_SECONDS) as held:
        if held is None:
            return
        for row in stores.indexes.all():
            _mend(row, stores, settings, held)
        while _index_some(stores, settings, held):
            pass
        for row in stores.indexes.all():
            held.check()
            if stores.index.exists(row.table_name):
                _build_if_due(row, stores, settings)
                held.check()
                stores.index.tidy(row.table_name)
        _drop_unused(stores)


def rebuild_index(encoder_id: str, stores: Stores, settings: Settings, holder: str) -> bool:
    """Make the encoder's table anew from its bags; False while another writer is at work."""
    with stores.leases.hold(LEASE, holder, LEASE_SECONDS) as held:
        if held is None:
            return False
        rebuild(stores.indexes.started(encoder_id), stores, settings, held)
        return True


def _index_some(stores: Stores, settings: Settings, held: Held) -> bool:
    """One commit of what waits; False where nothing did."""
    waiting = stores.indexes.not_indexed(limit=BAGS_PER_COMMIT)
    if not waiting:
        return False
    encoder_id = waiting[0][0].encoder_id
    row = stores.indexes.started(encoder_id)
    if row.broken or not _is_whole(row, stores):
        rebuild(row, stores, settings, held)
        return True
    group = [(key, content) for key, content in waiting if key.encoder_id == encoder_id]
    bags = []
    for key, content in group:
        try:
            bags.append((slice_rows(key, content, stores), content))
        except SeriesNotFound:  # erased meanwhile
            continue
        except (FileNotFoundError, Damaged):  # replaced, then its new bag waits; else nobody may wait for it
            stores.inspection.withdraw(key, content, "failed", LOST_BAG)
    if not bags:
        return True
    held.check()
    stores.index.replace(row.table_name, [bag for bag, _ in bags])
    try:
        held.check()
    except LeaseLost:  # somebody may have written the same rows beside these
        stores.indexes.forget(encoder_id, [bag.key.series_uid for bag, _ in bags])
        raise
    stores.indexes.indexed([_indexed(bag, content) for bag, content in bags])
    return True


def _is_whole(row: IndexRow, stores: Stores) -> bool:
    """The table is there, unless nothing was ever written to it."""
    return stores.index.exists(row.table_name) or not stores.indexes.rows(row.encoder_id)


def _mend(row: IndexRow, stores: Stores, settings: Settings, held: Held) -> None:
    """Write again the series whose rows are too few or too many; make an unreadable table anew."""
    if not row.broken and _is_whole(row, stores):
        if not stores.index.exists(row.table_name):
            return
        try:
            _mend_rows(row, stores, held)
            return
        except IndexBroken as error:
            log.warning("index of %s: %s", row.encoder_id, error)
    log.warning("index of %s is made anew from the bags", row.encoder_id)
    rebuild(row, stores, settings, held)


def _mend_rows(row: IndexRow, stores: Stores, held: Held) -> None:
    name, expected = row.table_name, stores.indexes.expected(row.encoder_id)
    if stores.index.count(name) == sum(expected.values()):
        return
    found = stores.index.counts(name)
    wrong = sorted(uid for uid in found.keys() | expected.keys() if found.get(uid) != expected.get(uid))
    log.warning("index of %s: rows of %d series are not as they should be", row.encoder_id, len(wrong))
    for start in range(0, len(wrong), 500):
        part = wrong[start : start + 500]
        held.check()
        stores.indexes.forget(row.encoder_id, part)
        stores.index.remove(name, part)


def rebuild(row: IndexRow, stores: Stores, settings: Settings, held: Held) -> None:
    """Into a table of another name; searches change over when it is whole."""
    encoder_id, name = row.encoder_id, stores.index.new_name(row.encoder_id)
    contents = list(stores.indexes.embedded(encoder_id).items())
    done: list[Indexed] = []
    try:
        for start in range(0, len(contents), BAGS_PER_COMMIT):
            bags, kept = [], []
            for uid, content in contents[start : start + BAGS_PER_COMMIT]:
                try:
                    bags.append(slice_rows(EmbeddingKey(uid, encoder_id), content, stores))
                    kept.append(content)
                except (FileNotFoundError, SeriesNotFound, Damaged):
                    continue  # replaced: its new bag waits as any other; or erased; or said when it is taken in
            held.check()
            if bags:
                stores.index.append(name, bags)
            done += [_indexed(bag, content) for bag, content in zip(bags, kept, strict=True)]
        if done:
            stores.index.settle(name)
        measured = _built(encoder_id, name, stores, settings, None) if done else None
        held.check()
    except BaseException:
        stores.index.drop(name)
        raise
    stores.indexes.switch(encoder_id, name, done, measured)


def _build_if_due(row: IndexRow, stores: Stores, settings: Settings) -> None:
    measured = _built(row.encoder_id, row.table_name, stores, settings, row.built_rows)
    if measured:
        stores.indexes.measured(row.encoder_id, measured)


def _built(encoder_id: str, name: str, stores: Stores, settings: Settings, before: int | None) -> Measured | None:
    """An ANN index over the table, measured; None where it is not due.

    Its commit needs no lease: it adds an index over the rows it saw, and changes no row.
    """
    rows = stores.index.count(name)
    due = rows >= settings.index_ann_rows and (before is None or rows >= GROWTH * before)
    if not due:
        return None
    log.info("index of %s: building an ANN index over %d rows", encoder_id, rows)
    started = time.monotonic()
    stores.index.build(name)
    seconds = round(time.monotonic() - started, 1)
    contents = {EmbeddingKey(uid, encoder_id): content for uid, content in stores.indexes.embedded(encoder_id).items()}
    probes = draw_probes(stores.bags, _windows(contents, stores), contents)
    measured = measure_recall(stores.index, name, probes, settings.index_recall, seconds)
    log.info("index of %s: recall at 10 is %.3f, effort %s", encoder_id, measured.recall, measured.effort)
    return measured


def _windows(contents: Mapping[EmbeddingKey, str], stores: Stores) -> list[str]:
    """Of an encoder, as the first of its bags that is there says."""
    for key, content in contents.items():
        with suppress(FileNotFoundError, Damaged):
            return list(stores.bags.receipt(key, content)["windows"])
    return []


def _drop_unused(stores: Stores) -> None:
    used = {row.table_name for row in stores.indexes.all()}
    for name in stores.index.names():
        if name not in used and stores.index.age_seconds(name, time.time()) > UNUSED_SECONDS:
            stores.index.drop(name)


def slice_rows(key: EmbeddingKey, content: str, stores: Stores) -> SliceRows:
    """A bag's rows. Raises FileNotFoundError for one that was replaced."""
    series, receipt = stores.catalog.series(key.series_uid), stores.bags.receipt(key, content)
    return SliceRows(
        key=key,
        patient_key=series.patient_key,
        study_uid=series.study_uid,
        sop_uids=receipt["sop_uids"],
        z_mm=receipt["z_mm"],
        windows=receipt["windows"],
        bag=stores.bags.get(key, content),
        frames=receipt.get("frames"),
    )


def _indexed(rows: SliceRows, content: str) -> Indexed:
    count = rows.bag.shape[0] * rows.bag.shape[1]
    return Indexed(rows.key, content, count, mean_vector(rows.bag), bag_health(rows.bag))


def mean_vector(bag: NDArray[np.float16]) -> NDArray[np.float16]:
    """(slices, windows, dim) -> (windows * dim,) of length one: the mean direction at each window in turn."""
    return unit(unit(bag.astype(np.float32)).mean(axis=0).reshape(-1)).astype(np.float16)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the last axis of length one; zeros stay."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(lengths, lengths, np.float32(1.0)))
