"""An API of the test's own, on a real port, with keys."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn
from starlette.testclient import TestClient

from service.app import create_app
from service.client import Keyslice
from service.settings import Settings
from service.storage.api_keys import ApiKeys
from service.storage.chain import Chain
from service.storage.database import Database, upgrade


def client_over(http: TestClient) -> Keyslice:
    """A client of the app that a TestClient has started, which it leaves open."""

    def answer(asked: httpx.Request) -> httpx.Response:
        told = http.request(asked.method, str(asked.url), content=asked.content, headers=asked.headers.multi_items())
        return httpx.Response(told.status_code, content=told.content, headers=told.headers.multi_items())

    return Keyslice("http://testserver", transport=httpx.MockTransport(answer))


def settings_of(data_dir: Path, **others) -> Settings:
    return Settings(data_dir=data_dir, sweep_seconds=3600, **{"broker_url": "memory://", **others})


def keys_of(settings: Settings) -> ApiKeys:
    settings.data_dir.mkdir(exist_ok=True)
    upgrade(settings.catalog_url, settings.data_dir)
    return ApiKeys(Database(settings.catalog_url), Chain())


@contextmanager
def serving(settings: Settings, **options) -> Iterator[uvicorn.Server]:
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join()
