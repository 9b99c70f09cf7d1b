"""Some instances of a cohort, each as likely as any other, as an Arrow stream."""

import random
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from service.errors import SeriesNotFound
from service.features.bags import Cohort, FeatureBag, read_bag
from service.features.outbox import Outbox
from service.features.tables import schema, table
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

if TYPE_CHECKING:
    import pyarrow


def sample(
    cohort: Cohort,
    about: dict[str, Any],
    count: int,
    seed: int,
    stores: Stores,
    noted: Callable[[list[str]], None] = lambda _: None,
) -> Iterator[bytes]:
    """`count` instances, or all of a smaller cohort: a record batch per series. Only bags drawn from are read.

    The same cohort and seed give the same instances. A series that is erased meanwhile is left out.
    `noted` hears of each series before it is given out.
    """
    import pyarrow as pa

    outbox, form = Outbox(), _schema(about, cohort.dim)
    with pa.ipc.new_stream(outbox, form) as writer:
        for series_uid, rows in drawn(cohort, count, seed, stores):
            member = stores.cohorts.member(EmbeddingKey(series_uid, cohort.encoder_id))
            bag = read_bag(member, cohort.windows, stores, patient_ids=cohort.patient_ids) if member else None
            if bag is None:
                continue
            try:
                tags = stores.tags.get(series_uid)
            except SeriesNotFound:
                continue
            noted([series_uid])
            writer.write_table(_rows(bag, rows, tags, about, cohort.dim))
            yield outbox.take()
    yield outbox.take()


def drawn(cohort: Cohort, count: int, seed: int, stores: Stores) -> Iterator[tuple[str, list[int]]]:
    """Series UIDs, each with the numbers of its instances, slice * windows + window, in ascending order."""
    windows = len(cohort.windows)
    total = cohort.slices * windows
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))
    start = at = 0
    for series_uid, slices in stores.cohorts.slices(cohort.chosen, cohort.encoder_id):
        end = start + slices * windows
        upto = bisect_left(chosen, end, at)
        if upto > at:
            yield series_uid, [number - start for number in chosen[at:upto]]
        start, at = end, upto
        if at == len(chosen):
            return


def _rows(bag: FeatureBag, rows: list[int], tags: list[str], about: dict[str, Any], dim: int) -> "pyarrow.Table":
    import pyarrow as pa

    whole = table(bag, about, dim)
    there = [row for row in rows if row < len(whole)]  # a bag that was replaced meanwhile may be another one
    picked = whole.take(pa.array(there, pa.int64())).drop_columns("receipt")
    form = _schema(about, dim)
    return pa.Table.from_arrays([*picked.columns, pa.array([tags] * len(there), form.field("tags").type)], schema=form)


def _schema(about: dict[str, Any], dim: int) -> "pyarrow.Schema":
    """As of a whole cohort; tags instead of the receipt."""
    import pyarrow as pa

    whole = schema(about, dim)
    return whole.remove(whole.get_field_index("receipt")).append(pa.field("tags", pa.list_(pa.string())))
