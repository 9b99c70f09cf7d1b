"""One thin task per verb. What they call is imported when they run, so that naming a task loads no torch."""

from functools import partial
from typing import Any

from celery import shared_task
from sqlalchemy.exc import OperationalError

from service.queue import (
    CHECK_CANARY,
    EMBED_QUERY,
    EMBED_SERIES,
    HEAT_MAP,
    INDEX_BAGS,
    KEEP_INDEX,
    RUN_EXPORT,
    TRAIN_HEAD,
)

# What may be over in a moment: a disk or database that was away. Bad data is never retried.
RETRIED: dict[str, Any] = {
    "autoretry_for": (OSError, OperationalError),
    "retry_backoff": 2,
    "max_retries": 5,
}


@shared_task(name=EMBED_SERIES, **RETRIED)
def embed_series(series_uid: str, encoder_id: str) -> None:
    from workers import pipeline, resources

    if pipeline.embed_series(series_uid, encoder_id, resources.resources()):
        index_bags.delay()


@shared_task(name=INDEX_BAGS, **RETRIED)
def index_bags() -> None:
    from service import indexing
    from workers import resources

    worker = resources.resources()
    indexing.index_bags(worker.stores, worker.settings, worker.holder)


@shared_task(name=KEEP_INDEX)
def keep_index() -> None:
    from service import indexing
    from workers import resources

    worker = resources.resources()
    indexing.keep_index(worker.stores, worker.settings, worker.holder)


@shared_task(name=TRAIN_HEAD)
def train_head(head_id: str) -> None:
    from workers import pipeline, resources

    worker = resources.resources()
    worker.trainings.start(head_id, partial(pipeline.train_head, head_id, worker))


@shared_task(name=RUN_EXPORT)
def run_export(export_id: str) -> None:
    from workers import exports, resources

    worker = resources.resources()
    see_to = partial(exports.see_to_export, export_id, worker.stores, worker.settings, worker.stopping)
    worker.exports.start(export_id, see_to)


@shared_task(name=CHECK_CANARY)
def check_canary() -> None:
    from workers import pipeline, resources

    pipeline.check_canary(resources.resources())


@shared_task(name=HEAT_MAP)
def heat_map(series_uid: str, content: str, head_id: str, slice: str, window: str, label: str) -> None:
    from service.storage.keys import HeatSpot
    from workers import explanations, resources

    spot = HeatSpot(series_uid, content, head_id, int(slice), window, label)
    explanations.heat_map(spot, resources.resources())


@shared_task(name=EMBED_QUERY)
def embed_query(query_id: str, encoder_id: str, window: str) -> None:
    from workers import queries, resources

    queries.embed_query(query_id, encoder_id, window, resources.resources())
