"""The Python client by itself: errors, retries, uploads, two ways of waiting."""

import asyncio
import os
import resource
import tracemalloc
from email.utils import formatdate

import httpx
import pytest
from answering import ACCEPTED, ADDRESS, JOB, RECEIVED, Line, client_of, refusal

from service import app, errors
from service.client import Keyslice
from service.client.twofold import at_once
from service.client.wire import ATTEMPTS, Blocking, ask, problem


class Patient(Blocking):
    """The blocking wire, which notes its pauses instead of making them."""

    def __init__(self, line: Line) -> None:
        super().__init__(ADDRESS, httpx.Client(base_url=ADDRESS, transport=httpx.MockTransport(line)))
        self.pauses: list[float] = []

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


def get(line: Line) -> Patient:
    wire = Patient(line)
    at_once(ask(wire, "GET", "/v1/jobs/j1", again=True))
    return wire


KNOWN = [kind for kind in errors.kinds().values() if any(base in app.STATUSES for base in kind.__mro__)]


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.__name__)
def test_every_error_of_the_service_is_raised_as_itself(kind):
    raised = kind("found 1, expected 2", reason="missing", needed=["read"], retry_after_seconds=1)
    answer = asyncio.run(app._on_error(None, raised))

    found = problem(httpx.Response(answer.status_code, content=answer.body, headers=dict(answer.headers)), ADDRESS)

    assert (type(found), str(found)) == (kind, "found 1, expected 2")
    assert found.found == {"title": kind.__doc__.rstrip("."), "status": answer.status_code, **raised.found}


@pytest.mark.parametrize(
    ("status", "kind", "error"),
    [
        (422, "invalid-request", errors.BadRequest),
        (404, "not-found", errors.NotFound),
        (404, "moon-not-found", errors.NotFound),
        (409, "moon-full", errors.Conflict),
        (500, "internal-error", errors.KeysliceError),
    ],
)
def test_a_kind_of_a_newer_service_is_the_nearest_one_of_the_tree(status, kind, error):
    assert type(problem(refusal(status, kind), ADDRESS)) is error


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>a router</html>"),
        httpx.Response(200, json={"hello": "world"}),
        httpx.Response(403, text="<html>a proxy</html>"),
        httpx.Response(404, json={"type": "urn:keyslice:series-not-found"}),
        httpx.Response(302, headers={"Location": "http://elsewhere.test"}),
        httpx.Response(400, text="{", headers={"content-type": "application/problem+json"}),
    ],
    ids=["page", "json", "proxy", "not-problem", "redirect", "broken"],
)
def test_another_server_is_named_as_none_of_ours(answer):
    with pytest.raises(errors.ServiceAway, match="is no Keyslice service"):
        client_of(Line(answer)).get_series("1.2")


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
def test_what_may_pass_is_asked_again(status):
    line = Line(refusal(status, "broker-down"), httpx.Response(200, json=JOB))

    wire = get(line)

    assert (len(line.asked), len(wire.pauses)) == (2, 1)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500])
def test_what_will_not_pass_is_asked_once(status):
    line = Line(refusal(status, "job-not-found"))
    with pytest.raises(errors.JobNotFound):
        get(line)
    assert len(line.asked) == 1


def test_patience_ends_with_the_services_own_error_and_grows_meanwhile():
    line = Line(*[refusal(503, "workers-busy")] * ATTEMPTS)
    wire = Patient(line)

    with pytest.raises(errors.WorkersBusy, match="D"):
        at_once(ask(wire, "GET", "/v1/jobs/j1", again=True))

    assert len(line.asked) == ATTEMPTS
    assert all(0.5 * 2**k <= pause <= 0.5 * 2**k + 0.5 for k, pause in enumerate(wire.pauses))


@pytest.mark.parametrize("asked", ["7", "date"])
def test_retry_after_is_waited_for(asked):
    import time

    retry = formatdate(time.time() + 7, usegmt=True) if asked == "date" else asked
    wire = get(Line(refusal(429, "too-many-requests", retry=retry), httpx.Response(200, json=JOB)))
    assert 5 <= wire.pauses[0] <= 7


@pytest.mark.parametrize(("retry", "calls"), [("3600", 1), ("soon", 2)])
def test_longer_than_anyone_waits_is_an_error_and_nonsense_is_no_wish(retry, calls):
    line = Line(refusal(429, "too-many-requests", retry=retry), refusal(404, "job-not-found"))
    with pytest.raises(errors.TooManyRequests if calls == 1 else errors.JobNotFound):
        get(line)
    assert len(line.asked) == calls


@pytest.mark.parametrize("error", [httpx.ConnectError, httpx.ReadError, httpx.ReadTimeout, httpx.RemoteProtocolError])
def test_a_connection_that_breaks_is_made_again(error):
    line = Line(httpx.Response(200, json=JOB), error("broken"), httpx.Response(200, json=JOB))
    wire = get(line)

    at_once(ask(wire, "GET", "/v1/jobs/j1", again=True))

    assert len(line.asked) == 3


def test_a_service_that_never_answered_is_not_waited_for():
    line = Line(httpx.ConnectError("refused"))
    with pytest.raises(errors.ServiceAway, match=r"no service answers at http://keyslice\.test: ConnectError"):
        get(line)
    assert len(line.asked) == 1


@pytest.mark.parametrize("address", ["127.0.0.1:8000", "localhost:8000", ""])
def test_an_address_that_is_none_is_said_to_be_none(address):
    with pytest.raises(errors.ServiceAway, match="expected an address as http://host:port"):
        Keyslice(address).get_job("j1")


@pytest.mark.parametrize(
    ("answer", "run"),
    [
        (ACCEPTED, lambda client: client.train(b"patient_id,x\n")),
        (RECEIVED, lambda client: client.export("/mnt/pacs")),
        (RECEIVED, lambda client: client.erase_series("1.2")),
    ],
    ids=["train", "export", "erase"],
)
def test_what_would_be_done_twice_is_asked_once(answer, run):
    line = Line(refusal(503, "broker-down"), httpx.Response(200, json=answer))
    with pytest.raises(errors.BrokerDown):
        run(client_of(line))
    assert len(line.asked) == 1


def test_an_upload_that_broke_off_is_sent_again_whole(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"x" * 100_000)
    line = Line(refusal(408, "request-timeout", retry=0), httpx.Response(202, json=RECEIVED))
    seen = []

    client_of(line).upload(tmp_path, progress=lambda sent, total: seen.append((sent, total)))

    first, second = (request.read().split(b"\r\n\r\n", 1)[1].split(b"\r\n--")[0] for request in line.asked)
    assert first == second == b"x" * 100_000
    assert max(seen) == seen[-1] == (100_000, 100_000)


class Reading(httpx.BaseTransport):
    """Takes bodies piece by piece, and keeps none."""

    def __init__(self) -> None:
        self.size, self.declared, self.open_at_once = 0, 0, 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.declared = int(request.headers["content-length"])
        for piece in request.stream:
            self.size += len(piece)
            self.open_at_once = max(self.open_at_once, len(os.listdir("/dev/fd")))  # noqa: PTH208
        return httpx.Response(202, json=RECEIVED)


def test_a_folder_of_more_files_than_may_be_open_is_sent(tmp_path):
    for number in range(200):
        place = tmp_path / f"{number % 7}" / f"{number}.dcm"
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"%d" % number)
    transport, before = Reading(), len(os.listdir("/dev/fd"))  # noqa: PTH208
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(before + 16, 64), hard))
        Keyslice(ADDRESS, transport=transport).upload(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert transport.size == transport.declared > 0
    assert transport.open_at_once <= before + 1


def test_a_large_file_is_never_in_memory(tmp_path):
    with (tmp_path / "large.zip").open("wb") as file:
        file.truncate(128 * 2**20)
    transport = Reading()
    client = Keyslice(ADDRESS, transport=transport)
    tracemalloc.start()

    client.upload(tmp_path / "large.zip")

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert transport.size > 128 * 2**20
    assert peak < 4 * 2**20


@pytest.mark.parametrize("several", [False, True])
def test_files_keep_their_place_below_the_folder(tmp_path, several):
    for name in ("b/2.dcm", "b/c/3.dcm", "a.dcm"):
        (tmp_path / "top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "top" / name).write_bytes(b"x")
    line = Line(httpx.Response(202, json=RECEIVED))

    client_of(line).upload([tmp_path / "top" / "b", str(tmp_path / "top" / "a.dcm")] if several else tmp_path / "top")

    body = line.asked[0].read().decode()
    names = [part.split('"')[0] for part in body.split('filename="')[1:]]
    assert names == (["2.dcm", "c/3.dcm", "a.dcm"] if several else ["a.dcm", "b/2.dcm", "b/c/3.dcm"])


def test_nothing_to_send_is_said_before_anything_is_sent(tmp_path):
    line = Line()
    for files in (tmp_path, tmp_path / "nowhere.dcm", []):
        with pytest.raises(FileNotFoundError):
            client_of(line).upload(files)
    assert line.asked == []


def test_awaited_calls_let_others_run_and_work_in_one_event_loop_after_the_other():
    async def slow(_request: httpx.Request) -> httpx.Response:
        await meet.wait()  # nobody comes alone
        return httpx.Response(200, json=JOB)

    client = Keyslice(ADDRESS, transport=httpx.MockTransport(slow))

    async def both() -> list[str]:
        nonlocal meet
        meet = asyncio.Barrier(2)
        found = await asyncio.gather(client.get_job.aio("j1"), client.get_job.aio("j1"))
        return [job.state for job in found]

    meet = None
    assert asyncio.run(both()) == asyncio.run(both()) == ["done", "done"]


def test_a_blocking_call_works_where_an_event_loop_runs_as_in_a_notebook():
    client = client_of(Line(httpx.Response(200, json={"series": [], "next_cursor": None})))

    async def cell() -> list:
        return list(client.series())

    assert asyncio.run(cell()) == []


@pytest.mark.parametrize("awaited", [False, True])
def test_pages_are_asked_for_as_they_are_needed(awaited):
    head = {
        "name": "n",
        "version": 1,
        "promoted": True,
        "state": "ready",
        "error": None,
        "created_at": "2026-01-31T00:00:00Z",
        "encoder_id": "e",
        "labels": [],
        "options": {},
        "report": None,
    }
    pages = [{"heads": [{"head_id": name, **head}], "next_cursor": name} for name in "ab"]
    line = Line(*[httpx.Response(200, json=page) for page in pages])
    client = client_of(line)

    async def first() -> str:
        async for each in client.heads.aio():
            return each.head_id

    assert (asyncio.run(first()) if awaited else next(client.heads()).head_id) == "a"
    assert len(line.asked) == 1


def test_both_ways_of_closing():
    async def run() -> None:
        async with client_of(Line(httpx.Response(200, json=JOB))) as client:
            await client.get_job.aio("j1")
        with pytest.raises(RuntimeError, match="closed"):
            client.get_job("j1")

    asyncio.run(run())


def test_waiting_ends_with_the_job_or_says_why_not():
    def states(*found):
        return client_of(Line(*[httpx.Response(200, json=JOB | each) for each in found]))

    seen = []
    assert states({"state": "running"}, {}).wait("j1", progress=lambda job: seen.append(job.state)).state == "done"
    assert seen == ["running", "done"]
    with pytest.raises(errors.JobFailed, match="job j1 failed: no such patient"):
        states({"state": "failed", "error": "no such patient"}).wait("j1")
    with pytest.raises(errors.JobFailed) as raised:
        states({"state": "cancelled"}).wait("j1")
    assert raised.value.found["job"].state == "cancelled"
    with pytest.raises(TimeoutError, match="job j1 is running"):
        states({"state": "running"}).wait("j1", timeout=0)
