"""The Celery app of the workers: `celery -A workers.app worker`.

The pool is `threads`: torch and lance do not survive a fork, and tasks wait for the encoder and its decoding
processes rather than compute. So a worker embeds a few series at once and fills its batches from all of
them. More GPUs or cores are more workers.
"""

import logging

from celery.signals import worker_init, worker_shutdown, worker_shutting_down

from service import logs, traces
from service.queue import celery_app
from service.settings import Settings

settings = Settings()
app = celery_app(settings)
logs.follow_tasks(settings)
traces.set_up("worker")
app.conf.imports = ("workers.tasks",)
app.conf.worker_pool = "threads"
app.conf.worker_concurrency = settings.series_at_once

log = logging.getLogger(__name__)


@worker_init.connect
def open_resources(**_: object) -> None:
    """Load the service's encoder before the first task; torch and lance are in no other process of ours."""
    from models.runtimes import CannotRun
    from models.specs import LicenceForbids, MissingWeights, WrongWeights
    from workers.resources import resources

    worker = resources()
    try:
        worker.line(worker.own_encoder_id())
    except (MissingWeights, WrongWeights, CannotRun, LicenceForbids) as error:
        log.error("%s", error)  # tasks will fail with this reason; the rest works


@worker_shutting_down.connect
def hand_back(**_: object) -> None:
    """At the first SIGTERM or Ctrl-C, while tasks still run."""
    from workers.resources import resources

    resources().stopping.set()


@worker_shutdown.connect
def close_resources(**_: object) -> None:
    from workers.resources import resources

    resources().close()
