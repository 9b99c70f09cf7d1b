"""What a caller of the API does again and again: make a small series, post it, wait for it."""

import io
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from pydicom.dataset import FileDataset

from models.ct.phantom import Identity, ct_slice

SPACING = (5.0, 1.0, 1.0)  # mm


def slice_files(
    identity: Identity,
    count: int = 6,
    size: int = 32,
    seed: int = 0,
    change: Callable[[int, FileDataset], None] | None = None,
) -> list[tuple[str, bytes]]:
    """(name, bytes) of a small series with noise of its own; `change` may spoil each dataset."""
    random = np.random.default_rng(seed)
    files = []
    for number in range(count):
        hu = random.normal(0, 200, (size, size)).astype(np.float32).clip(-1000, 1000)
        dataset = ct_slice(hu, number * SPACING[0], number, SPACING, identity)
        if change:
            change(number, dataset)
        content = io.BytesIO()
        dataset.save_as(content, enforce_file_format=True)
        files.append((f"{number}.dcm", content.getvalue()))
    return files


def post(http: httpx.Client, files: Sequence[tuple[str, bytes]], **query: str) -> httpx.Response:
    parts = [("files", (name, content, "application/dicom")) for name, content in files]
    return http.post("/v1/series", files=parts, params=query)


def tarred(files: Sequence[tuple[str, bytes]], mode: str = "w") -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode=mode) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return body.getvalue()


def wait(http: httpx.Client, job_id: str, seconds: float = 120.0) -> dict[str, Any]:
    """The job when it has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        job = http.get(f"/v1/jobs/{job_id}").raise_for_status().json()
        if job["state"] in ("done", "failed"):
            return job
        time.sleep(0.1)
    raise AssertionError(f"job not over after {seconds} s: {job}")


def embed(http: httpx.Client, files: Sequence[tuple[str, bytes]], **query: str) -> dict[str, Any]:
    """Post, wait until it is indexed, and answer what the POST said."""
    answer = post(http, files, **query)
    assert answer.status_code == 202, answer.text
    assert wait(http, answer.json()["job_id"])["state"] == "done"
    return answer.json()


def read(paths: Sequence[Path]) -> list[tuple[str, bytes]]:
    return [(path.name, path.read_bytes()) for path in paths]
