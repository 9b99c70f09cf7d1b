"""Heads, predictions, attention and search, each call once."""

import io
import json
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Unpack

from service.client.answers import Attention, Predictions, SearchAnswer
from service.client.asked import Explaining, HeadLike, Labels, Searching, SearchingImage, SearchingSeries, Training
from service.client.calls import at, given, pages, parsed, plain
from service.client.wire import Wire, ask
from service.report.attention import Drawing, attention_curves
from service.schemas.heads import Head, HeadAccepted, HeadComparison, HeadPage
from service.schemas.search import SeriesSearchAnswer


async def train(wire: Wire, labels: Labels, **options: Unpack[Training]) -> HeadAccepted:
    """Train a head on a table of labels: a CSV file by its path or as bytes, or a DataFrame.

    Not tried again where it breaks off: it would train two.
    """
    fields = {name: _text(value) for name, value in options.items()}
    file = {"labels": ("labels.csv", io.BytesIO(_csv(labels)), "text/csv")}
    answer = await ask(wire, "POST", at("heads"), again=False, files=file, data=fields)
    return parsed(wire, HeadAccepted, answer)


async def heads(wire: Wire) -> AsyncGenerator[Head, None]:
    """Every head in the order of their ids, without the rows and splits of their reports."""
    async for page in pages(wire, HeadPage, at("heads"), {}):
        for each in page.heads:
            yield each


async def get_head(wire: Wire, head: HeadLike) -> Head:
    """By id, by `name@version`, or by name: the promoted version."""
    return parsed(wire, Head, await ask(wire, "GET", at("heads", head_id(head)), again=True))


async def promote(wire: Wire, head: HeadLike) -> Head:
    """From now on the head's name alone means this version."""
    return parsed(wire, Head, await ask(wire, "POST", at("heads", head_id(head), "promote"), again=True))


async def compare(wire: Wire, head: HeadLike, other: HeadLike) -> HeadComparison:
    """The first head minus the second on the same patients."""
    path, query = at("heads", head_id(head), "comparison"), {"with": head_id(other)}
    return parsed(wire, HeadComparison, await ask(wire, "GET", path, again=True, params=query))


async def predict(
    wire: Wire,
    patient_id: str,
    *,
    head: HeadLike,
    series_uid: str | None = None,
    study_uid: str | None = None,
    **asked: Unpack[Explaining],
) -> Predictions:
    """A probability per label, from all of the patient's accepted series together or from those named."""
    query = given(head=head_id(head), series_uid=series_uid, study_uid=study_uid, **asked)
    answer = await ask(wire, "GET", at("patients", patient_id, "predictions"), again=True, params=query)
    return parsed(wire, Predictions, answer)


async def get_prediction(wire: Wire, prediction_id: str) -> Predictions:
    """A prediction once more: the same head on the same bags."""
    return parsed(wire, Predictions, await ask(wire, "GET", at("predictions", prediction_id), again=True))


async def attention(wire: Wire, series_uid: str, *, head: HeadLike, **asked: Unpack[Explaining]) -> Attention:
    """The head's weight of every slice at every window, top and key slices, faithfulness."""
    query = given(head=head_id(head), **asked)
    answer = await ask(wire, "GET", at("series", series_uid, "attention"), again=True, params=query)
    return parsed(wire, Attention, answer)


async def plot_attention(wire: Wire, series_uid: str, *, head: HeadLike, **asked: Unpack[Explaining]) -> Drawing:
    """The same as curves over the body, one per window, with the key slices marked."""
    return attention_curves(await attention(wire, series_uid, head=head, **asked))


async def similar(
    wire: Wire,
    series_uid: str | None = None,
    slice: int | None = None,
    window: str | None = None,
    **options: Unpack[Searching],
) -> SearchAnswer:
    """The nearest stored slices by cosine: to a stored slice, to several (`slices`), or to a vector; docs/search.md."""
    body = _body(options, series_uid=series_uid, slice=slice, window=window)
    return parsed(wire, SearchAnswer, await ask(wire, "POST", at("search"), again=True, json=body))


async def similar_image(
    wire: Wire, image: str | Path | bytes, *, encoder: str | None = None, **options: Unpack[SearchingImage]
) -> SearchAnswer:
    """The nearest stored slices to one that is sent, DICOM or a PNG at a window; the service keeps nothing of it."""
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    form = {"query": json.dumps(_body(options))}
    file = {"file": ("slice", io.BytesIO(content), "application/octet-stream")}
    query = given(encoder=encoder)
    answer = await ask(wire, "POST", at("search", "image"), again=True, params=query, files=file, data=form)
    return parsed(wire, SearchAnswer, answer)


async def similar_series(wire: Wire, series_uid: str, **options: Unpack[SearchingSeries]) -> SeriesSearchAnswer:
    """The series most like this one: by their mean, by what a head attends to, or slice by slice."""
    body = _body(options, series_uid=series_uid)
    return parsed(wire, SeriesSearchAnswer, await ask(wire, "POST", at("search", "series"), again=True, json=body))


def head_id(head: HeadLike) -> str:
    return head if isinstance(head, str) else head.head_id


def _body(options: Mapping[str, Any], **slice: Any) -> dict[str, Any]:
    body = given(**slice) | {name: plain(value) for name, value in options.items()}
    if "slices" in body:
        body["slices"] = [plain(each) for each in body["slices"]]
    if "vector" in body:
        body["vector"] = [float(each) for each in body["vector"]]
    return body


def _csv(labels: Labels) -> bytes:
    if isinstance(labels, bytes):
        return labels
    if isinstance(labels, str | Path):
        return Path(labels).read_bytes()
    return str(labels.to_csv(index=False)).encode()


def _text(value: Any) -> Any:
    """A form has nothing but text; a list becomes a field that is repeated."""
    if isinstance(value, bool):
        return str(value).lower()
    return [str(each) for each in value] if isinstance(value, list | tuple) else str(value)
