"""Bodies of any length: refused before they are read, by what their sender tells or as soon as they are too long."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
from posting import post, slice_files
from serving import serving, settings_of

from models.ct.phantom import Identity
from service.app import create_app
from service.bounded import FILES
from service.embedded import Running, free_port
from service.routes.search import MAX_IMAGE_BYTES
from service.settings import Settings

MIB = 2**20
BODY, UPLOAD, LABELS = 1000, 3000, 2000  # bytes that the small service takes
SCHEMA = create_app(Settings(broker_url="memory://")).openapi()


class Call(NamedTuple):
    name: str  # as `POST /v1/search`
    media: str

    @property
    def most(self) -> int:
        beside = {"POST /v1/heads": LABELS, "POST /v1/search/image": MAX_IMAGE_BYTES}
        if self.name in beside:
            return beside[self.name] + BODY
        return UPLOAD if self.media.startswith("multipart/") else BODY


CALLS = [
    Call(f"{method.upper()} {path}", media)
    for path, operations in SCHEMA["paths"].items()
    for method, operation in operations.items()
    for media in operation.get("requestBody", {"content": ()})["content"]
]
EVERY_CALL = pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    """Host and port of a service that takes little; nothing of what it refuses stays."""
    port, folder = free_port("127.0.0.1", 0), tmp_path_factory.mktemp("bounded")
    little = {"max_body_bytes": BODY, "max_upload_bytes": UPLOAD, "max_labels_bytes": LABELS}
    with serving(settings_of(folder / "data", **little), port=port):
        yield "127.0.0.1", port
    assert list((folder / "data" / "staging").glob("*")) == []


def answered(place: tuple[str, int], call: Call, length: str, sent: bytes) -> dict[str, Any]:
    """The problem that comes back to a sender who waits for it with more to send."""
    method, _, path = call.name.partition(" ")
    media = f'{call.media}; boundary=edge; type="application/dicom"' if "multipart" in call.media else call.media
    head = f"{method} {re.sub('{.*?}', '1.2.3', path)} HTTP/1.1\r\nHost: 127.0.0.1:{place[1]}\r\nConnection: close\r\n"
    with socket.create_connection(place, timeout=30) as connection:
        connection.sendall(f"{head}Content-Type: {media}\r\n{length}\r\n\r\n".encode() + sent)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, problem = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 413 "), answer
    assert b"application/problem+json" in head
    return json.loads(problem)


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


def beginning(call: Call) -> bytes:
    if "multipart" not in call.media:
        return b'"'
    name = next(name for word, name in {"heads": "labels", "image": "file", "": "files"}.items() if word in call.name)
    kind = "Content-Type: application/dicom\r\n" if "related" in call.media else ""
    return f'--edge\r\nContent-Disposition: form-data; name="{name}"; filename="a"\r\n{kind}\r\n'.encode()


@EVERY_CALL
def test_a_body_that_tells_too_great_a_length_is_not_read(place, call):
    found = answered(place, call, f"Content-Length: {call.most + 1}", b"")

    assert found["type"] == "urn:keyslice:upload-too-large"
    assert found["detail"] == f"the body has {call.most + 1} bytes, expected at most {call.most}"


@EVERY_CALL
def test_a_sender_who_tells_no_length_is_answered_before_the_end(place, call):
    start = beginning(call)

    found = answered(
        place, call, "Transfer-Encoding: chunked", chunk(start) + chunk(b"a" * (call.most + 1 - len(start)))
    )

    assert found["type"] == "urn:keyslice:upload-too-large"
    assert found["detail"] == f"the body is longer than {call.most} bytes"


def test_what_takes_files_and_nothing_else_takes_more_than_other_bodies():
    assert {call.name for call in CALLS if call.media.startswith("multipart/")} == set(FILES)
    assert len(CALLS) > len(FILES)


def test_a_body_of_just_the_length_is_read(place):
    url, padded = f"http://127.0.0.1:{place[1]}", b'{"k": 0}'.ljust(BODY)

    answer = httpx.post(f"{url}/v1/search", content=padded, headers={"Content-Type": "application/json"})

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:keyslice:invalid-request")


def test_memory_does_not_grow_with_what_is_refused(http, service: Running):
    assert post(http, slice_files(Identity("BEFORE-THE-FLOOD"), count=1)).status_code == 202  # all is imported
    (api,) = [each for each in psutil.Process(service.process.pid).children() if "uvicorn" in each.cmdline()]
    Path(f"/proc/{api.pid}/clear_refs").write_text("5")  # proc(5): the peak is measured from here
    before = api.memory_info().rss

    answer = http.post("/v1/search", content=b'"' + bytes(100 * MIB), headers={"Content-Type": "application/json"})

    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{api.pid}/status").read_text())
    assert answer.status_code == 413
    assert int(peak) * 1024 - before < 30 * MIB


@pytest.mark.parametrize("depth", [b"%b", b'{"filters": %b}', b'{"slices": [%b]}'])
def test_a_million_unknown_fields_are_not_told_one_by_one(http, depth):
    fields = b"{" + b",".join(b'"%x":1' % number for number in range(500_000)) + b"}"

    answer = http.post("/v1/search", content=depth % fields, headers={"Content-Type": "application/json"})

    assert answer.status_code == 422
    assert "500000 fields" in answer.json()["detail"]
    assert len(answer.content) < 10_000


def test_the_first_errors_alone_are_told(http):
    answer = http.post("/v1/search", json={"encoder": "efficientnet_lite0", "vector": ["x"] * 1000})

    assert answer.status_code == 422
    assert [each["where"] for each in answer.json()["errors"]] == [["body", "vector", k] for k in range(20)]


def test_every_list_and_object_of_a_body_is_bounded():
    """So that there are not as many errors as bytes."""
    found = []

    def walk(schema: Any) -> None:
        if isinstance(schema, list):
            for each in schema:
                walk(each)
        elif isinstance(schema, dict):
            if name := schema.get("$ref"):
                walk(SCHEMA["components"]["schemas"][name.rpartition("/")[2]])
            if schema.get("type") in ("array", "object"):
                found.append(schema)
            for each in schema.values():
                walk(each)

    for path, method in (call.name.split()[::-1] for call in CALLS if call.media == "application/json"):
        walk(SCHEMA["paths"][path][method.lower()]["requestBody"])

    assert len(found) > 10
    assert all(each["maxItems"] for each in found if each["type"] == "array"), found
    assert not any(each["additionalProperties"] for each in found if each["type"] == "object"), found
