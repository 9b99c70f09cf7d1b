"""Spans of a real service, sent to a collector over HTTP: one trace from a request to the task it asked for."""

import gzip
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from posting import embed, slice_files

from models.ct.phantom import Identity
from service import traces
from service.embedded import in_background

NAME = "TRACED-4417"
PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """What takes OTLP over HTTP, and keeps it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.sent: list[dict] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def spans(self) -> list[tuple[str, dict]]:
        """(part of the service, span)."""
        return [
            (_part(each), span)
            for sent in [*self.sent]
            for each in sent["resourceSpans"]
            for scope in each["scopeSpans"]
            for span in scope["spans"]
        ]


def _part(resource_spans: dict) -> str:
    attributes = {each["key"]: each["value"] for each in resource_spans["resource"]["attributes"]}
    return attributes["service.name"]["stringValue"]


class Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        self.server.sent.append(MessageToDict(ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def collected(tmp_path_factory) -> Iterator[list[tuple[str, dict]]]:
    collector = Collector()
    address = f"http://127.0.0.1:{collector.server_port}"
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": address, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with (
        in_background(tmp_path_factory.mktemp("traced"), **variables) as running,
        httpx.Client(base_url=running.address, timeout=60) as http,
    ):
        trace_id, span_id = PARENT
        http.headers["traceparent"] = f"00-{trace_id}-{span_id}-01"
        embed(http, slice_files(Identity(NAME), count=2))
        assert http.get(f"/v1/patients/{NAME}/predictions", params={"head": "none"}).status_code == 404
        end = time.monotonic() + 30
        while not {"keyslice-api", "keyslice-worker"} <= {part for part, _ in collector.spans()}:
            assert time.monotonic() < end
            time.sleep(0.1)
        time.sleep(0.5)
    yield collector.spans()
    collector.shutdown()


def attributes(span: dict) -> dict:
    return {each["key"]: next(iter(each["value"].values())) for each in span.get("attributes", ())}


def test_a_request_is_a_span_by_its_route(collected):
    named = {span["name"]: attributes(span) for part, span in collected if part == "keyslice-api"}

    assert named["POST /v1/series"]["http.response.status_code"] == "202"
    asked = named["GET /v1/patients/{patient_id}/predictions"]
    assert (asked["http.route"], asked["http.response.status_code"]) == ("/v1/patients/{patient_id}/predictions", "404")


def test_its_task_is_in_the_same_trace(collected):
    tasks = [span for part, span in collected if part == "keyslice-worker" and span["name"].startswith("run/")]

    (embedding,) = [span for span in tasks if span["name"] == "run/keyslice.embed_series"]
    request = next(span for _, span in collected if span["name"] == "POST /v1/series")
    assert embedding["traceId"] == request["traceId"]


def test_no_span_says_who_a_patient_is(collected):
    assert NAME not in json.dumps(collected)


def test_without_a_collector_nothing_is_sent(monkeypatch):
    for name in traces.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)

    assert traces.set_up("api") is False


def test_without_the_sdk_the_log_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    assert traces.set_up("api") is False
    assert "install keyslice[traces]" in caplog.text
