"""What Prometheus reads: counts and ages from the catalog, and how long this process took to answer.

Labels are states, encoders, vendors of a closed list, routes as templates, statuses: never a path, which may hold
a patient's id, and never what a file says.
"""

import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.drift import FIRST, norm_drift, ranks
from service.errors import BrokerDown
from service.queue import Queue
from service.storage.stores import Stores
from service.storage.tables import now

BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds
UNMATCHED = "none"  # no route has this path
NEWEST = 200  # bags of an encoder whose health is told
VENDORS = ("GE", "SIEMENS", "PHILIPS", "CANON", "TOSHIBA", "FUJIFILM", "HITACHI", "UIH", "NEUSOFT", "SAMSUNG")


class FromStores(Collector):
    """Asked of catalog, broker and disk at every scrape, so any API process answers for the whole service."""

    def __init__(self, stores: Stores, queue: Queue, data_dir: Path) -> None:
        self._stores = stores
        self._queue = queue
        self._data_dir = data_dir

    def describe(self) -> list[Metric]:
        return []  # else registering would collect

    def collect(self) -> Iterator[Metric]:
        try:
            yield from self._catalog()
            catalog_up = 1
        except SQLAlchemyError:
            catalog_up = 0
        yield GaugeMetricFamily("keyslice_catalog_up", "1 where the catalog answers", value=catalog_up)
        yield from self._broker()
        disk = shutil.disk_usage(self._data_dir)
        yield GaugeMetricFamily("keyslice_disk_free_bytes", "free where the data directory lies", value=disk.free)
        yield GaugeMetricFamily("keyslice_disk_total_bytes", "of the disk of the data directory", value=disk.total)

    def _catalog(self) -> Iterator[Metric]:
        counts = self._stores.figures.embedding_counts()
        states = GaugeMetricFamily(
            "keyslice_embeddings", "embeddings by encoder and state", labels=["encoder", "state"]
        )
        slices = GaugeMetricFamily("keyslice_slices_embedded", "slices whose embeddings are stored", labels=["encoder"])
        for each in counts:
            states.add_metric([each.encoder_id, each.state], each.embeddings)
        for encoder_id in sorted({each.encoder_id for each in counts}):
            slices.add_metric([encoder_id], sum(each.slices for each in counts if each.encoder_id == encoder_id))
        yield from (states, slices)
        recall = GaugeMetricFamily(
            "keyslice_search_recall", "at 10, of the ANN index, measured at its last build", labels=["encoder"]
        )
        for index in self._stores.indexes.all():
            if index.recall is not None:
                recall.add_metric([index.encoder_id], index.recall)
        yield recall
        oldest = self._stores.figures.oldest_waiting()
        waited = 0.0 if oldest is None else max(0.0, (now() - oldest).total_seconds())
        yield GaugeMetricFamily(
            "keyslice_oldest_waiting_seconds", "of the series that waits longest for a worker", value=waited
        )
        yield from health_metrics(sorted({each.encoder_id for each in counts}), self._stores)
        canary, last = self._stores.canaries.last(), self._stores.catalog.last_embedded_at()
        times = [when for when in (last, canary and canary[0]) if when is not None]
        if times:
            ago = (now() - max(times)).total_seconds()
            yield GaugeMetricFamily("keyslice_embedded_seconds_ago", "since a worker last embedded a slice", value=ago)

    def _broker(self) -> Iterator[Metric]:
        try:
            depth = self._queue.depth()
            yield GaugeMetricFamily("keyslice_queue_messages", "messages that no worker has taken yet", value=depth)
            broker_up = 1
        except BrokerDown:
            broker_up = 0
        yield GaugeMetricFamily("keyslice_broker_up", "1 where the broker answers", value=broker_up)


def health_metrics(encoder_ids: Sequence[str], stores: Stores) -> Iterator[Metric]:
    """Of the newest bags by vendor, and of the canary."""
    labels = ["encoder", "vendor"]
    rank = GaugeMetricFamily("keyslice_effective_rank", "of a bag, mean over the newest", labels=labels)
    moved = GaugeMetricFamily(
        "keyslice_norm_drift", "of the newest bags from the encoder's first, in standard deviations", labels=labels
    )
    for encoder_id in encoder_ids:
        reference, newest = stores.health.first(encoder_id, FIRST), defaultdict(list)
        for each in stores.health.last(encoder_id, NEWEST):
            newest[vendor(each.manufacturer)].append(each)
        for name, bags in sorted(newest.items()):
            if with_rank := ranks(bags):
                rank.add_metric([encoder_id, name], fmean(with_rank))
            drift = norm_drift(fmean(each.norm for each in bags), reference)
            if drift is not None:
                moved.add_metric([encoder_id, name], drift)
    cosine = GaugeMetricFamily(
        "keyslice_canary_cosine", "of the canary's last embedding to its first", labels=["encoder"]
    )
    for encoder_id, value in stores.canaries.cosines().items():
        cosine.add_metric([encoder_id], value)
    yield from (rank, moved, cosine)


def vendor(manufacturer: str) -> str:
    """One of VENDORS, or `other`: what a file says is no label."""
    words = re.split("[^A-Z]+", manufacturer.upper())
    return next((name.lower() for name in VENDORS if name in words), "other")


class Timed:
    """ASGI middleware: seconds from a request's first byte to the answer's last, by route."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "keyslice_http_request_seconds",
            "from a request to the end of its answer",
            ["method", "route", "status"],
            buckets=BUCKETS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started = "none", time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path_format", UNMATCHED)
            method = scope["method"] if route != UNMATCHED else UNMATCHED  # a caller may make up any method
            self._seconds.labels(method, route, status).observe(time.perf_counter() - started)
