"""A service that answers what it is told to, for clients."""

import httpx

from service.client import Keyslice

ADDRESS = "http://keyslice.test"
JOB = {
    "job_id": "j1",
    "kind": "embed",
    "state": "done",
    "created_at": "2026-01-31T00:00:00Z",
    "done": 1,
    "known": 1,
    "unit": "slices",
    "states": {},
    "name": None,
    "subject": "/v1/jobs/j1",
    "ended_at": None,
    "series": [],
    "head_id": None,
    "export_id": None,
    "error": None,
}
RECEIVED = {"job_id": "j1", "series": [], "set_aside": []}
ACCEPTED = {"job_id": "j1", "head_id": "h1", "warnings": []}


class Line:
    """Answers one after the other, and what was asked; an exception among them is raised."""

    def __init__(self, *answers) -> None:
        self.answers, self.asked = [*answers], []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def refusal(status: int, kind: str, **others) -> httpx.Response:
    body = {"type": f"urn:keyslice:{kind}", "title": "T", "status": status, "detail": "D", **others}
    headers = {"Retry-After": str(others["retry"])} if "retry" in others else {}
    return httpx.Response(status, json=body, headers={**headers, "content-type": "application/problem+json"})


def client_of(line: Line, **options) -> Keyslice:
    return Keyslice(ADDRESS, transport=httpx.MockTransport(line), **options)
