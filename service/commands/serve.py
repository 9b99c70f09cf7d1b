"""`keyslice serve` and `keyslice work`: one part of the service, in this process."""

import os

from service.terminal import read_settings


def serve() -> None:
    """Serve the API alone, until Ctrl-C. Workers, a broker and what else `keyslice up` starts are yours to start."""
    from service.embedded import api_command

    _become(api_command(read_settings()))


def work() -> None:
    """Embed, index and train as a worker, until Ctrl-C: for the API and broker of the same settings."""
    from service.embedded import WORKER

    read_settings()  # wrong ones end here, with the reason
    _become(WORKER)


def _become(command: list[str]) -> None:
    os.execv(command[0], command)
