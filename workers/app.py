"""The Celery app of the workers: `celery -A workers.app worker`.

The pool is `solo`: one process that takes one task at a time. torch and lance do not survive a fork, and
decoding runs in processes of its own, which a forked pool's children may not have. More GPUs or cores are
more workers.
"""

import logging

from celery.signals import worker_process_init, worker_process_shutdown

from service.queue import celery_app
from service.settings import Settings

app = celery_app(Settings())
app.conf.imports = ("workers.tasks",)
app.conf.worker_pool = "solo"

log = logging.getLogger(__name__)


@worker_process_init.connect
def open_resources(**_: object) -> None:
    """Load the service's encoder before the first task; torch and lance are in no other process of ours."""
    from models.specs import MissingWeights, WrongWeights
    from workers.resources import resources

    worker = resources()
    try:
        worker.encoder(worker.settings.encoder)
    except (MissingWeights, WrongWeights) as error:  # tasks will fail with this reason; the rest works
        log.error("%s", error)


@worker_process_shutdown.connect
def close_resources(**_: object) -> None:
    from workers.resources import resources

    resources().close()
