"""Processes beside this one that begin anew, and end with it."""

import multiprocessing
import os
import threading

# Forking a process that has run torch hangs.
SPAWN = multiprocessing.get_context("spawn")


def end_with_parent() -> None:
    """Of a spawned process: a killed parent leaves no orphan behind, not even one that is busy."""
    threading.Thread(target=_wait_for_end, daemon=True).start()


def _wait_for_end() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(0)
