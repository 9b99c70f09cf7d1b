"""Whether archive, bags, index and catalog say the same, and mending what can be mended.

Safe beside a running service: what was touched within SETTLED_SECONDS may be on its way and is left out, and every
difference is looked at twice, with the catalog asked in between.
"""

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from service.checking import DIFFERING, check_index, compare
from service.errors import StorageUnreachable
from service.indexing import keep_index
from service.settings import Settings
from service.storage.catalog import OPEN
from service.storage.index import IndexBroken
from service.storage.inspection import LOST_BAG, Archived
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

SETTLED_SECONDS = 600.0
PAGE = 500  # series at a time

Kind = Literal[
    "file_missing",  # counted by the catalog, not in the archive
    "file_damaged",  # another SHA-256 than on arrival
    "file_unknown",  # in the archive, not counted by the catalog
    "bag_missing",
    "bag_damaged",
    "bag_unknown",  # neither counted nor on its way
    "heatmaps_unknown",  # of a series that is not here
    "index_rows",  # not what the bags say
    "index_broken",
]
SEND_AGAIN = "send the series again"


@dataclass(frozen=True)
class Difference:
    kind: Kind
    where: str  # UIDs and encoder ids only
    found: str
    mended: bool = False


@dataclass
class Report:
    """How much was looked at, and what differs."""

    series: int = 0
    files: int = 0
    bags: int = 0
    rows: int = 0  # of the index
    differences: list[Difference] = field(default_factory=list)


def check(
    stores: Stores,
    settings: Settings,
    *,
    repair: bool = False,
    checksums: bool = True,
    seen: Callable[[Report], None] = lambda report: None,
) -> Report:
    """Compare every store with the others; `seen` is called after each series and each bag.

    Without `checksums` files and bags are looked for and not read. With `repair`: what nobody knows is removed, an
    embedding whose bag is lost is made again by the next worker, index rows are written again. A file of the archive
    that is lost or damaged only its sender can bring.
    """
    report = Report()
    parts = (
        _archived(stores, report, repair=repair, checksums=checksums),
        _unknown_series(stores, repair=repair),
        _bags(stores, report, repair=repair, checksums=checksums),
        _unknown_bags(stores, repair=repair),
        _unknown_heat_maps(stores, repair=repair),
        _index(stores, settings, report, repair=repair, checksums=checksums),
    )
    for part in parts:
        for difference in part:
            if difference:
                report.differences.append(difference)
            seen(report)
    return report


def _archived(stores: Stores, report: Report, *, repair: bool, checksums: bool) -> Iterator[Difference | None]:
    for page in stores.inspection.archived(PAGE):
        for series in page:
            report.series += 1
            report.files += series.received
            yield from _files(series, stores, repair=repair)
            if checksums:
                yield from _damaged_files(series, stores)
            yield None


def _files(series: Archived, stores: Stores, *, repair: bool) -> Iterator[Difference]:
    """The files of a series against what the catalog counts."""
    uid, changed_at = series.series_uid, stores.archive.changed_at(series.series_uid)
    counted = stores.archive.content(uid) == (series.content, series.received)
    if counted or (changed_at is not None and not _settled(changed_at)):
        return
    if stores.inspection.archived_now(uid) != series or stores.erasures.being_erased(uid):
        return
    files, sums = set(stores.archive.sop_uids(uid)), stores.checksums.of(uid)
    known = len(sums) == series.received  # then the catalog knows them by name
    if known and files > sums.keys():
        for sop_uid in sorted(files - sums.keys()):
            if repair:
                stores.archive.discard(uid, sop_uid)
            yield Difference("file_unknown", f"{uid}/{sop_uid}", "the catalog does not count it", repair)
    elif known and sums.keys() - files:
        for sop_uid in sorted(sums.keys() - files):
            yield Difference("file_missing", f"{uid}/{sop_uid}", SEND_AGAIN)
    else:
        found = f"{len(files)} files, or others, expected {series.received} as the catalog counts them; {SEND_AGAIN}"
        yield Difference("file_missing", uid, found)


def _damaged_files(series: Archived, stores: Stores) -> Iterator[Difference]:
    sums = stores.checksums.of(series.series_uid)
    for sop_uid in sorted(sums):
        try:
            wrong = stores.archive.sha256(series.series_uid, sop_uid) != sums[sop_uid]
        except FileNotFoundError:  # told already, or erased meanwhile
            continue
        except StorageUnreachable:
            raise
        except OSError as error:
            yield Difference("file_damaged", f"{series.series_uid}/{sop_uid}", f"{error.strerror}; {SEND_AGAIN}")
            continue
        if wrong and stores.checksums.of(series.series_uid, [sop_uid]) == {sop_uid: sums[sop_uid]}:
            found = f"its SHA-256 is another than on arrival; {SEND_AGAIN}"
            yield Difference("file_damaged", f"{series.series_uid}/{sop_uid}", found)


def _unknown_series(stores: Stores, *, repair: bool) -> Iterator[Difference | None]:
    """Folders of the archive that no upload lived to note."""
    for uid in _not_here(stores.archive.series(), stores):
        if _settled(stores.archive.changed_at(uid)):
            if repair:
                stores.catalog.abandon(uid)
            yield Difference("file_unknown", uid, "the catalog has no such series", repair)


def _bags(stores: Stores, report: Report, *, repair: bool, checksums: bool) -> Iterator[Difference | None]:
    for page in stores.inspection.counted_bags(PAGE):
        for key, content in page.items():
            report.bags += 1
            yield _bag(key, content, stores, repair=repair, checksums=checksums)


def _bag(key: EmbeddingKey, content: str, stores: Stores, *, repair: bool, checksums: bool) -> Difference | None:
    kind: Kind = "bag_missing"
    if stores.bags.exists(key, content):
        kind = "bag_damaged"
        try:
            found = stores.bags.damage(key, content) if checksums else None
        except FileNotFoundError:
            kind, found = "bag_missing", "it is not there"
    else:
        found = "it is not there"
    if (
        found is None
        or stores.inspection.counted(key).content != content
        or stores.erasures.being_erased(key.series_uid)
    ):
        return None
    again = bool(stores.archive.sop_uids(key.series_uid))
    if repair:
        state, error = ("received", None) if again else ("failed", LOST_BAG)
        stores.inspection.withdraw(key, content, state, error)
    then = "the next worker embeds the series again" if again else SEND_AGAIN
    return Difference(kind, _named(key), f"{found}; {then}", repair and again)


def _unknown_bags(stores: Stores, *, repair: bool) -> Iterator[Difference | None]:
    """What dead workers left, and bags that were replaced."""
    for key, name in stores.bags.everything():
        counted = stores.inspection.counted(key)
        kept = {counted.content, counted.indexed_content, *stores.predictions.contents(key)}
        if name in {f"{content}.zarr" for content in kept} or counted.state in OPEN:
            continue
        if not _settled(stores.bags.changed_at(key, name)):
            continue
        if repair:
            stores.bags.discard(key, name)
        yield Difference("bag_unknown", f"{_named(key)}/{name}", "the catalog does not count it", repair)


def _unknown_heat_maps(stores: Stores, *, repair: bool) -> Iterator[Difference | None]:
    for uid in _not_here(stores.heatmaps.series(), stores):
        if repair:
            stores.heatmaps.remove(uid)
        yield Difference("heatmaps_unknown", uid, "the catalog has no such series", repair)


def _index(
    stores: Stores, settings: Settings, report: Report, *, repair: bool, checksums: bool
) -> Iterator[Difference | None]:
    differences = _row_differences if checksums else _count_differences
    for encoder_id in sorted({*stores.indexes.encoders(), *(row.encoder_id for row in stores.indexes.all())}):
        damaged = {each.where for each in report.differences if each.kind == "bag_damaged"}  # their rows may be right
        found = [each for each in differences(encoder_id, stores, report) if each.where not in damaged]
        if found and repair:
            _write_again(encoder_id, found, stores, settings)
            left = {each.where for each in differences(encoder_id, stores, Report())}
            found = [replace(each, mended=each.where not in left) for each in found]
        yield from found
        yield None


def _row_differences(encoder_id: str, stores: Stores, report: Report) -> list[Difference]:
    """One for each series, or one for all where the index does not read."""
    checked = check_index(encoder_id, stores)
    report.rows += checked.rows
    if checked.differences["broken"]:
        return [Difference("index_broken", encoder_id, "; ".join(checked.differences["broken"]))]
    wrong = _by_series(checked.differences)
    row = stores.indexes.get(encoder_id)
    if not wrong or row is None:
        return []
    try:  # somebody may have written meanwhile
        again = compare(row.table_name, stores.inspection.indexed_of(encoder_id, wrong), encoder_id, stores)
    except IndexBroken as error:
        return [Difference("index_broken", encoder_id, str(error))]
    unknown = {"extra": [uid for uid in checked.differences["extra"] if "/" not in uid]}
    still = _by_series(again) | _by_series(unknown)
    return [Difference("index_rows", f"{encoder_id}/{uid}", ", ".join(still[uid])) for uid in sorted(still)]


def _count_differences(encoder_id: str, stores: Stores, report: Report) -> list[Difference]:
    """As _row_differences(), of how many rows there are."""
    row = stores.indexes.get(encoder_id)
    if row is None:
        return []
    expected = stores.indexes.expected(encoder_id)
    try:
        found = stores.index.counts(row.table_name) if expected or stores.index.exists(row.table_name) else {}
    except IndexBroken as error:
        return [Difference("index_broken", encoder_id, str(error))]
    report.rows += sum(found.values())
    now = stores.indexes.expected(encoder_id)  # somebody may have written meanwhile
    wrong = sorted(
        uid
        for uid in found.keys() | expected.keys()
        if expected.get(uid) == now.get(uid) and found.get(uid, 0) != expected.get(uid, 0)
    )
    return [
        Difference("index_rows", f"{encoder_id}/{uid}", f"{found.get(uid, 0)} rows, expected {expected.get(uid, 0)}")
        for uid in wrong
    ]


def _by_series(differences: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Of each series, how many of its rows differ in which way."""
    said: dict[str, list[str]] = {}
    for kind in DIFFERING:
        names = [name.partition("/")[0] for name in differences.get(kind, ())]
        for uid in sorted(set(names)):
            said.setdefault(uid, []).append(f"{names.count(uid)} {kind}")
    return said


def _write_again(encoder_id: str, found: Iterable[Difference], stores: Stores, settings: Settings) -> None:
    row = stores.indexes.get(encoder_id)
    if row and any(each.kind == "index_broken" for each in found):
        stores.indexes.broken(encoder_id, row.table_name)
    else:
        stores.indexes.forget(encoder_id, [each.where.rpartition("/")[2] for each in found])
    keep_index(stores, settings, f"{socket.gethostname()}:{os.getpid()}")


def _not_here(series_uids: Iterable[str], stores: Stores) -> Iterator[str]:
    """Those of which the catalog has no row, and that are not just being erased."""
    for uid in series_uids:
        if stores.inspection.archived_now(uid) is None and not stores.erasures.being_erased(uid):
            yield uid


def _settled(changed_at: float | None) -> bool:
    """It is there, and nothing came lately."""
    return changed_at is not None and time.time() - changed_at > SETTLED_SECONDS


def _named(key: EmbeddingKey) -> str:
    return f"{key.encoder_id}/{key.series_uid}"
