"""Exports: a directory or archive of a PACS, embedded series by series."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from fastapi.responses import StreamingResponse

from service.deps import EncodersDep, QueueDep, SettingsDep, ShownDep, StoresDep, needs
from service.exports import checked_uri
from service.pulls import asked_of
from service.schemas.base import Text
from service.schemas.exports import (
    Export,
    ExportAccepted,
    ExportFilePage,
    ExportFileSetAside,
    ExportPage,
    ExportRequest,
    ExportSeries,
    ExportSeriesState,
    ExportSummary,
)
from service.storage.stores import Stores
from service.storage.tables import ExportRow, ExportSeriesRow

router = APIRouter(prefix="/v1/exports", tags=["exports"])

CSV = "text/csv"
COLUMNS = ["series_uid", "state", "files", "slices", "set_aside", "reasons", "seconds", "error"]
CSV_ANSWER: dict[int | str, dict[str, Any]] = {200: {"content": {CSV: {"schema": {"type": "string"}}}}}

Cursor = Annotated[Text | None, Query(description="next_cursor of the page before")]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.post("", status_code=202, dependencies=[needs("write")])
def post_export(
    body: ExportRequest,
    stores: StoresDep,
    settings: SettingsDep,
    queue: QueueDep,
    encoders: EncodersDep,
    shown: ShownDep,
) -> ExportAccepted:
    """Embed every usable series of an export. One of the same that has not come to its end goes on where it is."""
    uri = checked_uri(body.uri, settings.export_roots)
    options = {"dry_run": body.dry_run, **asked_of(uri, body.query, body.queries)}
    row, resumed = stores.exports.add(uri, encoders.id(body.encoder), options)
    shown.about(export=row.export_id)
    queue.export(row.export_id)
    return ExportAccepted.model_validate({**_columns(row), "resumed": resumed})


@router.post("/{export_id}/retry", status_code=202, dependencies=[needs("write")])
def retry_export(
    export_id: Text,
    stores: StoresDep,
    settings: SettingsDep,
    queue: QueueDep,
    encoders: EncodersDep,
    shown: ShownDep,
) -> ExportAccepted:
    """The same as posting what this export was asked for again: what is not embedded is tried."""
    earlier = stores.exports.get(export_id)
    uri = checked_uri(earlier.uri, settings.export_roots)
    row, resumed = stores.exports.add(uri, encoders.id(earlier.encoder_id), earlier.options)
    queue.export(row.export_id)
    shown.about(export=row.export_id)
    return ExportAccepted.model_validate({**_columns(row), "resumed": resumed})


@router.get("", dependencies=[needs("read")])
def list_exports(stores: StoresDep, cursor: Cursor = None, limit: Limit = 100) -> ExportPage:
    """The exports here, in the order of their ids."""
    rows = stores.exports.list(after=cursor, limit=limit + 1)
    page = [ExportSummary.model_validate(_columns(row)) for row in rows[:limit]]
    return ExportPage(exports=page, next_cursor=page[-1].export_id if len(rows) > limit else None)


@router.get("/{export_id}", dependencies=[needs("read")], response_model=Export, responses=CSV_ANSWER)
def get_export(
    export_id: Text,
    stores: StoresDep,
    state: Annotated[ExportSeriesState | None, Query(description="of the series listed")] = None,
    cursor: Cursor = None,
    limit: Limit = 100,
    accept: Annotated[str, Header()] = "application/json",
) -> Any:
    """How far it is, and what became of each series, in the order of their UIDs; all of them at once as CSV."""
    row = stores.exports.get(export_id)
    if CSV in accept:
        return _table(row, stores)
    rows = stores.contents.series(export_id, state=state, after=cursor, limit=limit + 1)
    reasons = stores.contents.reasons(export_id, [each.series_uid for each in rows])
    page = [_series(each, reasons[each.series_uid]) for each in rows[:limit]]
    files, size, slices = stores.contents.totals(export_id)
    return Export.model_validate(
        {
            **_columns(row),
            "files": files,
            "bytes": size,
            "slices": slices,
            "set_aside": stores.contents.all_reasons(export_id),
            "states": stores.contents.states(export_id),
            "series": page,
            "next_cursor": page[-1].series_uid if len(rows) > limit else None,
        }
    )


@router.get(
    "/{export_id}/table.csv", dependencies=[needs("read")], response_class=StreamingResponse, responses=CSV_ANSWER
)
def get_table(export_id: Text, stores: StoresDep) -> StreamingResponse:
    """What became of each series, a line for each."""
    return _table(stores.exports.get(export_id), stores)


@router.get("/{export_id}/files", dependencies=[needs("read")])
def list_files(
    export_id: Text,
    stores: StoresDep,
    series_uid: Annotated[str | None, Query(max_length=64, description="empty: files that name no series")] = None,
    cursor: Annotated[str | None, Query(pattern=r"^[0-9a-f]{32}$", description="as above")] = None,
    limit: Limit = 100,
) -> ExportFilePage:
    """Every file that is not used, with its reason."""
    stores.exports.get(export_id)
    after = bytes.fromhex(cursor) if cursor else None
    rows = stores.contents.files_aside(export_id, series_uid=series_uid, after=after, limit=limit + 1)
    files = [
        ExportFileSetAside.model_validate({**vars(row), "file": row.name.decode("utf-8", "backslashreplace")})
        for row in rows[:limit]
    ]
    return ExportFilePage(files=files, next_cursor=rows[limit - 1].file_key.hex() if len(rows) > limit else None)


def _columns(row: ExportRow) -> dict[str, Any]:
    return {**vars(row), **row.options}


def _series(row: ExportSeriesRow, reasons: Counter[str]) -> ExportSeries:
    return ExportSeries.model_validate({**vars(row), "set_aside": reasons + Counter(row.slices_set_aside or {})})


def _table(row: ExportRow, stores: Stores) -> StreamingResponse:
    name = {"Content-Disposition": f'attachment; filename="export-{row.export_id}.csv"'}
    return StreamingResponse(_lines(row.export_id, stores), media_type=CSV, headers=name)


def _lines(export_id: str, stores: Stores) -> Iterator[str]:
    yield _line(COLUMNS)
    for row, reasons in stores.contents.every_series(export_id):
        each = _series(row, reasons)
        told = " ".join(f"{reason}:{count}" for reason, count in sorted(each.set_aside.items()))
        yield _line(
            [
                each.series_uid,
                each.state,
                each.files,
                each.slices,
                sum(each.set_aside.values()),
                told,
                each.seconds,
                each.error,
            ]
        )


def _line(cells: list[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()
