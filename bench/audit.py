"""What the audit costs a read, a write and a verification: the service's own app, with the audit and without it."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from starlette.testclient import TestClient

from models.ct.phantom import Identity
from service.app import create_app
from service.audited import Audited
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.chain import Event
from service.storage.stores import open_stores

READS = 2000
WRITES = 200
ENTRIES = 100_000
AT_ONCE = 1000

UID = Identity("BENCH").series_uid


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(data_dir=Path(folder), broker_url="memory://", sweep_seconds=3600)
        stores = open_stores(settings)
        stores.catalog.receive([Arrival(UID, "1.2", "BENCH")], "toy@0")
        with_audit, without = create_app(settings), create_app(settings)
        without.user_middleware = [each for each in without.user_middleware if each.cls is not Audited]
        local = {"client": ("127.0.0.1", 1), "base_url": "http://127.0.0.1:8000"}
        with TestClient(with_audit, **local) as audited, TestClient(without, **local) as plain:
            reads = paired(lambda: read(audited), lambda: read(plain), READS)
        read_event = Event("local", "series.read", status=200, series_uids=(UID,))
        writes = [timed(lambda: stores.audit.append([read_event])) for _ in range(WRITES)]
        append = timed(lambda: [stores.audit.append([read_event] * AT_ONCE) for _ in range(ENTRIES // AT_ONCE)]) / (
            ENTRIES // AT_ONCE
        )
        verify = timed(stores.audit.verify)
        entries = stores.audit.verify().entries
        stores.close()
    figures = {
        "read_p50_ms": median(reads[0]),
        "read_without_p50_ms": median(reads[1]),
        "read_added_p50_ms": median([a - b for a, b in zip(*reads, strict=True)]),
        "read_added_p95_ms": quantile(reads[0]) - quantile(reads[1]),
        "write_added_p50_ms": median(writes),
        "thousand_appended_ms": append * 1e3,
        "verified_per_s": entries / verify,
    }
    for name, value in figures.items():
        print(f"{name:24} {value:10.3f}")
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


def read(client: TestClient) -> None:
    assert client.get(f"/v1/series/{UID}").status_code == 200


def paired(one: Callable[[], None], other: Callable[[], None], times: int) -> tuple[list[float], list[float]]:
    """Seconds of each, in turn: whatever else the machine does, it does to both."""
    for call in (one, other) * 20:
        call()
    first, second = [], []
    for _ in range(times):
        first.append(timed(one))
        second.append(timed(other))
    return first, second


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median(seconds: list[float]) -> float:
    return statistics.median(seconds) * 1e3


def quantile(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1] * 1e3


if __name__ == "__main__":
    main()
