"""The service as it is started on one machine: how long it keeps a connection."""

import http.client
import time
from urllib.parse import urlsplit

IDLE_SECONDS = 6.0  # longer than uvicorn keeps a connection unless told


def test_an_idle_connection_still_answers(service):
    connection = http.client.HTTPConnection(urlsplit(service.address).netloc, timeout=30)
    connection.connect()
    used = connection.sock

    for idle in (0.0, IDLE_SECONDS):
        time.sleep(idle)
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        assert answer.status == 200
        answer.read()

    assert connection.sock is used
    connection.close()
