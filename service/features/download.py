"""`keyslice features get`: a cohort's features, written to a file here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from service.client import Keyslice


def download(client: Keyslice, query: Mapping[str, Any], path: Path, console: Console) -> dict[str, Any]:
    """Write the cohort to `path`: all of it, or nothing. Raises KeysliceError or OSError."""
    columns = TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("features", total=None)
        return client.features(path, progress=lambda size: progress.update(task, completed=size), **query)
