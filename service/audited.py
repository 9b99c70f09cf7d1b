"""Which calls are audited, as what, and the one place that does it: a route says at most what it has shown."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.auth import Caller
from service.dicomweb.addresses import PREFIX
from service.recorder import Recorder
from service.storage.chain import MOST_SERIES, Event, Outcome

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    name: str
    writes: bool = False  # what has happened is on record before the caller hears of it
    noted: bool = False  # where it succeeds, by the transaction that does it


def _wrote(name: str) -> Kind:
    return Kind(name, writes=True)


NOBODYS = None  # nothing of a patient: figures, progress, ids

_SERIES, _PATIENT = "/v1/series/{series_uid}", "/v1/patients/{patient_id}"
_STUDY, _IN_STUDY = f"{PREFIX}/studies/{{study}}", f"{PREFIX}/studies/{{study}}/series/{{series}}"
_INSTANCE = f"{_IN_STUDY}/instances/{{instance}}"

AUDITED: Mapping[str, Kind | None] = {
    "POST /v1/series": _wrote("upload"),
    f"POST {_SERIES}/complete": _wrote("series.complete"),
    f"POST {_SERIES}/retry": _wrote("series.retry"),
    "GET /v1/series": Kind("series.list"),
    f"GET {_SERIES}": Kind("series.read"),
    f"DELETE {_SERIES}": Kind("erase", writes=True, noted=True),
    f"DELETE {_PATIENT}": Kind("erase", writes=True, noted=True),
    "GET /v1/erasures/{erasure_id}": NOBODYS,
    f"GET {_SERIES}/embeddings": Kind("embeddings.read"),
    "GET /v1/features": Kind("features.read"),
    "GET /v1/features/sample": Kind("features.read"),
    f"GET {_SERIES}/slices/{{slice_number}}/image": Kind("image.read"),
    f"GET {_SERIES}/slices/{{slice_number}}/heatmap": Kind("heatmap.read"),
    f"GET {_SERIES}/attention": Kind("attention.read"),
    f"GET {_PATIENT}/predictions": Kind("predictions.read"),
    "GET /v1/predictions/{prediction_id}": Kind("predictions.read"),
    f"GET {_SERIES}/key-objects": Kind("report.read"),
    f"GET {_SERIES}/report": Kind("report.read"),
    f"GET {_PATIENT}/report": Kind("report.read"),
    f"POST {_SERIES}/dicom-out": _wrote("dicom.send"),
    "POST /v1/search": Kind("search"),
    "POST /v1/search/image": Kind("search"),
    "POST /v1/search/series": Kind("search"),
    f"GET {_SERIES}/tags": Kind("tags.read"),
    f"PUT {_SERIES}/tags": _wrote("tags.write"),
    "POST /v1/heads": _wrote("train"),
    "GET /v1/heads": NOBODYS,
    "GET /v1/heads/{head_id}": NOBODYS,
    "POST /v1/heads/{head_id}/promote": _wrote("head.promote"),
    "GET /v1/heads/{head_id}/comparison": NOBODYS,
    "GET /v1/heads/{head_id}/report": NOBODYS,
    "GET /v1/heads/{head_id}/card": NOBODYS,
    "GET /v1/heads/{head_id}/weights": NOBODYS,
    "POST /v1/exports": _wrote("export"),
    "POST /v1/exports/{export_id}/retry": _wrote("export"),
    "GET /v1/exports": Kind("export.read"),
    "GET /v1/exports/{export_id}": Kind("export.read"),
    "GET /v1/exports/{export_id}/table.csv": Kind("export.read"),
    "GET /v1/exports/{export_id}/files": Kind("export.read"),
    "GET /v1/jobs": Kind("job.list"),  # names the exports, and whose uploads there were
    "GET /v1/jobs/{job_id}": NOBODYS,
    "POST /v1/jobs/{job_id}/cancel": _wrote("job.cancel"),
    "GET /v1/jobs/{job_id}/events": NOBODYS,
    f"POST {PREFIX}/studies": _wrote("dicomweb.store"),
    f"POST {_STUDY}": _wrote("dicomweb.store"),
    f"GET {PREFIX}/studies": Kind("dicomweb.search"),
    f"GET {PREFIX}/series": Kind("dicomweb.search"),
    f"GET {PREFIX}/instances": Kind("dicomweb.search"),
    f"GET {_STUDY}/series": Kind("dicomweb.search"),
    f"GET {_STUDY}/instances": Kind("dicomweb.search"),
    f"GET {_IN_STUDY}/instances": Kind("dicomweb.search"),
    f"GET {_STUDY}": Kind("dicomweb.files"),
    f"GET {_IN_STUDY}": Kind("dicomweb.files"),
    f"GET {_INSTANCE}": Kind("dicomweb.files"),
    f"GET {_STUDY}/metadata": Kind("dicomweb.metadata"),
    f"GET {_IN_STUDY}/metadata": Kind("dicomweb.metadata"),
    f"GET {_INSTANCE}/metadata": Kind("dicomweb.metadata"),
    f"GET {_INSTANCE}/bulkdata/{{place}}": Kind("dicomweb.pixels"),
    f"GET {_INSTANCE}/frames/{{frames}}": Kind("dicomweb.pixels"),
    f"GET {_INSTANCE}/rendered": Kind("dicomweb.picture"),
    f"GET {_INSTANCE}/frames/{{frame}}/rendered": Kind("dicomweb.picture"),
    f"GET {_STUDY}/thumbnail": Kind("dicomweb.picture"),
    f"GET {_IN_STUDY}/thumbnail": Kind("dicomweb.picture"),
    f"GET {_INSTANCE}/thumbnail": Kind("dicomweb.picture"),
    f"GET {_INSTANCE}/frames/{{frame}}/thumbnail": Kind("dicomweb.picture"),
    "GET /v1/encoders": NOBODYS,
    "GET /metrics": NOBODYS,
}


@dataclass
class Shown:
    """What a call gives out, takes in or begins, beside what its path names."""

    uids: dict[str, None] = field(default_factory=dict)  # of series
    study_uids: dict[str, None] = field(default_factory=dict)
    facts: dict[str, str | int] = field(default_factory=dict)

    def series(self, uids: Iterable[str]) -> None:
        self.uids.update(dict.fromkeys(uids))

    def studies(self, uids: Iterable[str]) -> None:
        """All their series."""
        self.study_uids.update(dict.fromkeys(uids))

    def passing(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each with a `series_uid`, noted as they are given out."""
        for item in items:
            self.uids[item.series_uid] = None  # type: ignore[attr-defined]
            yield item

    def about(self, **facts: str | int) -> None:
        """Ids that the service gave, and counts. Nothing that a caller may word freely: it could be a name."""
        self.facts.update(facts)


class Audited:
    """ASGI middleware: notes each call when its answer begins, and what streams after that as it is shown."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or "caller" not in scope["state"]:
            await self._app(scope, receive, send)
            return
        call = _Call(scope)

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                await call.answered(message["status"])
            elif len(call.shown.uids) >= MOST_SERIES:
                call.shown_since()
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            if call.status is None:
                await call.answered(500)
            raise
        finally:
            call.shown_since()


class _Call:
    def __init__(self, scope: Scope) -> None:
        self.shown: Shown = scope["state"].setdefault("shown", Shown())
        self.status: int | None = None
        self._scope = scope

    async def answered(self, status: int) -> None:
        self.status = status
        kind = self._kind()
        if kind is None or (kind.noted and status < 400):
            self.shown.uids.clear()
            return
        recorder: Recorder = self._scope["state"]["recorder"]
        event = self._event(kind, status)
        if kind.writes and status < 400:
            await run_in_threadpool(recorder.append, [event])
        else:
            recorder.note([event])

    def shown_since(self) -> None:
        if self.shown.uids and self.status is not None and (kind := self._kind()):
            self._scope["state"]["recorder"].note([self._event(kind, self.status, path=False)])

    def _kind(self) -> Kind | None:
        """A route that the table lacks is audited under its own name; a method that it lacks did nothing."""
        route: Any = self._scope.get("route")
        method = self._scope["method"]
        if method not in (getattr(route, "methods", None) or ()):
            return None
        name = f"{method} {route.path_format}"
        return AUDITED.get(name, Kind(name))

    def _event(self, kind: Kind, status: int, *, path: bool = True) -> Event:
        uids, self.shown.uids = self.shown.uids, {}
        named: dict[str, Any] = self._scope["path_params"] if path else {}
        series = [str(named[each]) for each in ("series_uid", "series") if each in named]
        whole = "study" in named and not (series or uids or kind.writes)
        studies = [*([str(named["study"])] if whole else []), *self.shown.study_uids]
        own = {each: named[f"{each}_id"] for each in ("export", "job", "prediction") if f"{each}_id" in named}
        return Event(
            who(self._scope["state"]["caller"]),
            kind.name,
            _outcome(status),
            status,
            series_uids=tuple(dict.fromkeys([*series, *uids])),
            study_uids=tuple(dict.fromkeys(studies)),
            patient_ids=tuple(str(named[each]) for each in ("patient_id",) if each in named),
            about=tuple(sorted(({} if status >= 400 else own | self.shown.facts).items())),
        )


def who(caller: Caller) -> str:
    return caller.name


def _outcome(status: int) -> Outcome:
    if status < 400:
        return "done"
    if status in (401, 403):
        return "denied"
    return "refused" if status < 500 else "failed"
