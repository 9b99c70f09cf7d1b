"""The Celery app of the workers: `celery -A workers.app worker`.

torch and lance do not survive a fork, so neither is imported here: the pool's parent stays without
them, and each child loads its encoder when it has started.
"""

import logging

from celery.signals import worker_process_init, worker_process_shutdown

from service.queue import celery_app
from service.settings import Settings

app = celery_app(Settings())
app.conf.imports = ("workers.tasks",)
app.conf.worker_proc_alive_timeout = 120  # seconds a child may take to load torch and its encoder

log = logging.getLogger(__name__)


@worker_process_init.connect
def open_resources(**_: object) -> None:
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
