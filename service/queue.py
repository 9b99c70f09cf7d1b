"""Work by task name: the only place in service/ that knows Celery."""

import json
import logging
import time
from base64 import b64decode
from collections.abc import Collection, Sequence
from typing import Any

import redis
from celery import Celery
from kombu.entity import Exchange
from kombu.entity import Queue as Messages
from kombu.exceptions import OperationalError

from service.errors import BrokerDown
from service.settings import Settings
from service.storage.keys import EmbeddingKey, HeatSpot
from service.storage.stores import Stores

EMBED_SERIES = "keyslice.embed_series"
INDEX_BAGS = "keyslice.index_bags"
KEEP_INDEX = "keyslice.keep_index"
TRAIN_HEAD = "keyslice.train_head"
RUN_EXPORT = "keyslice.run_export"
CHECK_CANARY = "keyslice.check_canary"
HEAT_MAP = "keyslice.heat_map"
EMBED_QUERY = "keyslice.embed_query"

# Workers take from these in turn, so that what is in one waits for at most one message of each of the others.
WORK = "keyslice"
ASKED = "keyslice.asked"  # what somebody waits for while their request is open
BEHIND = "keyslice.behind"  # series of senders of whom FAIR_SHARE are queued already: nobody else waits for all of them
LANES = (WORK, ASKED, BEHIND)
FAIR_SHARE = 8  # series of one sender: a study, or what an export has on its way

REWRITE_SECONDS = 30.0  # of the broker's append-only file

DEFAULT_BROKER = "redis://127.0.0.1:6379/0"

log = logging.getLogger(__name__)


def celery_app(settings: Settings) -> Celery:
    """The Celery app of both sides: JSON only, late acknowledgement, one message at a time."""
    app = Celery("keyslice", broker=settings.broker_url or DEFAULT_BROKER)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        task_default_queue=WORK,
        task_queues=[Messages(name, Exchange(name), routing_key=name) for name in LANES],  # type: ignore[no-untyped-call]
        task_routes={HEAT_MAP: {"queue": ASKED}, EMBED_QUERY: {"queue": ASKED}},
        task_ignore_result=True,
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_seconds,
            # How often a worker looks for messages of dead ones; kombu's defaults take minutes.
            "unacked_restore_interval": 2,
            "unacked_restore_throttle": 1,
            "socket_connect_timeout": 2,
            "retry_policy": {"max_retries": 1, "interval_start": 0.1, "timeout": 3},
        },
    )
    return app


class Queue:
    """Sends messages, which hold ids and names only, and sends again what was lost.

    The catalog says what is waiting; the broker may forget everything, and the sweep finds it again.
    """

    def __init__(self, settings: Settings, stores: Stores) -> None:
        self._app = celery_app(settings)
        self._settings = settings
        self._stores = stores
        self._canary_sent = float("-inf")
        self._upkeep_sent = float("-inf")

    def embed(self, keys: list[EmbeddingKey]) -> None:
        """Ask for embeddings whose rows are committed. A broker that is down costs time, not work."""
        try:
            self._send_in_turn(keys)
            self._stores.catalog.sent(keys)
        except BrokerDown:
            log.warning("broker does not answer; the sweep will send %d messages later", len(keys))

    def train(self, head_id: str) -> None:
        try:
            self._send(TRAIN_HEAD, head_id)
            self._stores.heads.sent(head_id)
        except BrokerDown:
            log.warning("broker does not answer; the sweep will send head %s later", head_id)

    def export(self, export_id: str) -> None:
        try:
            self._send(RUN_EXPORT, export_id)
            self._stores.exports.sent(export_id)
        except BrokerDown:
            log.warning("broker does not answer; the sweep will send export %s later", export_id)

    def heat_map(self, spot: HeatSpot) -> None:
        """Ask for a heat map. Raises BrokerDown; nothing is sent again, whoever waits will ask again."""
        self._send(HEAT_MAP, *spot.words())

    def embed_query(self, query_id: str, encoder_id: str, window: str) -> None:
        """Ask for the embedding of an uploaded slice. Raises BrokerDown; nothing is sent again."""
        self._send(EMBED_QUERY, query_id, encoder_id, window)

    def keep_index(self) -> None:
        """Ask for the index's upkeep. Raises BrokerDown."""
        self._send(KEEP_INDEX)
        self._upkeep_sent = time.monotonic()

    def sweep(self) -> None:
        """Send again what the catalog says is waiting and the broker has lost. Raises BrokerDown."""
        empty = self.depth() == 0
        stale = self._settings.stale_seconds
        self._send_in_turn(self._stores.catalog.lost(stale, queue_is_empty=empty))
        for head_id in self._stores.heads.lost(stale, queue_is_empty=empty):
            self._send(TRAIN_HEAD, head_id)
        for export_id in self._stores.exports.lost(stale, queue_is_empty=empty):
            self._send(RUN_EXPORT, export_id)
        if empty and self._stores.indexes.not_indexed(limit=1):
            self._send(INDEX_BAGS)
        if empty and time.monotonic() - self._upkeep_sent > self._settings.index_upkeep_seconds:
            self.keep_index()
        if empty and time.monotonic() - self._canary_sent > self._settings.canary_seconds:
            self._send(CHECK_CANARY)
            self._canary_sent = time.monotonic()

    def forget(self, series_uids: Collection[str]) -> int:
        """Remove the messages that name these series, in hand or not, and let the broker write its log anew.

        Answers how many they were. Raises BrokerDown.
        """
        try:
            with self._app.connection_for_write() as connection:
                client = connection.default_channel.client
                removed = sum(_forget_waiting(client, name, series_uids) for name in LANES)
                removed += _forget_in_hand(client, series_uids)
                _rewrite_log(client)
                return removed
        except (OperationalError, redis.RedisError, OSError) as error:
            raise BrokerDown(f"the broker does not answer: {type(error).__name__}") from error

    def depth(self) -> int:
        """Messages that no worker has taken yet, without those of open requests. Raises BrokerDown."""
        try:
            with self._app.connection_for_read() as connection:
                return sum(int(connection.default_channel.client.llen(name)) for name in (WORK, BEHIND))
        except (OperationalError, redis.RedisError, OSError) as error:
            raise BrokerDown(f"the broker does not answer: {type(error).__name__}") from error

    def close(self) -> None:
        self._app.close()

    def _send_in_turn(self, keys: Sequence[EmbeddingKey]) -> None:
        behind = self._stores.catalog.behind(keys, FAIR_SHARE)
        for key in keys:
            self._send(EMBED_SERIES, key.series_uid, key.encoder_id, lane=BEHIND if key in behind else None)

    def _send(self, task: str, *arguments: str, lane: str | None = None) -> None:
        try:
            self._app.send_task(task, args=arguments, retry=False, queue=lane)
        except (OperationalError, redis.RedisError, OSError) as error:
            raise BrokerDown(f"the broker does not answer: {type(error).__name__}") from error


def _forget_waiting(client: Any, name: str, series_uids: Collection[str]) -> int:
    naming = [message for message in client.lrange(name, 0, -1) if _names(json.loads(message), series_uids)]
    return sum(client.lrem(name, 0, message) for message in naming)


def _forget_in_hand(client: Any, series_uids: Collection[str]) -> int:
    """Those that a worker has taken and not acknowledged: kombu keeps them aside, to hand them on."""
    removed = 0
    for tag, kept in client.hscan_iter("unacked"):
        message, *_ = json.loads(kept)
        if _names(message, series_uids):
            client.zrem("unacked_index", tag)
            removed += client.hdel("unacked", tag)
    return removed


def _names(message: dict[str, Any], series_uids: Collection[str]) -> bool:
    arguments, *_ = json.loads(b64decode(message["body"]))
    return any(argument in series_uids for argument in arguments)


def _rewrite_log(client: Any) -> None:
    """Where the broker keeps an append-only file, every message that ever was is in it until it is rewritten."""
    if not client.info("persistence").get("aof_enabled"):
        return
    _await_rewritten(client)  # one that began before the messages went
    try:
        client.bgrewriteaof()
    except redis.ResponseError as error:  # not ours to ask for
        log.warning("the broker does not rewrite its append-only file: %s", type(error).__name__)
        return
    _await_rewritten(client)


def _await_rewritten(client: Any) -> None:
    end = time.monotonic() + REWRITE_SECONDS
    while (state := client.info("persistence"))["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"]:
        if time.monotonic() > end:
            raise OSError("the broker's append-only file is still being rewritten")
        time.sleep(0.02)
