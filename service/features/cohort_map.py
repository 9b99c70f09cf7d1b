"""`keyslice features map`: a sample of a cohort in two dimensions, with a picture of every point."""

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from models.durable import replacing
from models.projection import Projection, project
from service.client import Keyslice
from service.errors import KeysliceError
from service.report.map_page import map_page, points_of

TIMEOUT = httpx.Timeout(60, read=600)  # of a wait for the next bytes: a large cohort is counted before the first
PICTURE_SIDE = 128  # px
PICTURES_AT_ONCE = 4
QUALITY = 50  # of WebP: some 2 kB a picture

Point = dict[str, Any]


def make_map(client: Keyslice, query: Mapping[str, Any], path: Path, console: Console) -> dict[str, Any]:
    """Draw, project, fetch pictures, write the page; answers what is on it. Raises KeysliceError or OSError.

    Pictures on an older page at `path` are not fetched again.
    """
    about, points, vectors = _drawn(client, query)
    known = _pictures_of(path)
    with Progress(console=console) as progress:
        task = progress.add_task("pictures", total=len(points))
        wanted = [known.get(_name(point)) or point for point in points]
        with ThreadPoolExecutor(PICTURES_AT_ONCE) as pool:
            pictures = pool.map(lambda each: _picture(client, each, lambda: progress.advance(task)), wanted)
            projection = project(vectors, int(about["seed"]))
            for point, picture in zip(points, pictures, strict=True):
                point["picture"] = picture
    told = about | _placed(points, projection)
    with replacing(path) as file:
        file.write(map_page(told).encode())
    return told


def without_pictures(told: Mapping[str, Any]) -> dict[str, Any]:
    """What the page holds, as numbers and names alone."""
    bare = [{name: value for name, value in point.items() if name != "picture"} for point in told["points"]]
    return {**told, "points": bare}


def _drawn(client: Keyslice, query: Mapping[str, Any]) -> tuple[dict[str, Any], list[Point], NDArray[np.float16]]:
    """What the service says of the sample, its instances, their vectors (n, dim)."""
    import pyarrow as pa

    response = client.request("GET", "/v1/features/sample", params=query, timeout=TIMEOUT)
    table = pa.ipc.open_stream(response.content).read_all()
    about = json.loads(table.schema.metadata[b"keyslice"])
    about["series"] = int(response.headers["X-Keyslice-Series"])
    about["instances"] = int(response.headers["X-Keyslice-Slices"]) * len(about["windows"])
    vectors = table["vector"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return about, table.drop_columns("vector").to_pylist(), vectors


def _picture(client: Keyslice, wanted: Point | str, done: Callable[[], None]) -> str | None:
    """The slice at its window as a small data URI; None where the service gives none. A URI is its own answer."""
    try:
        if isinstance(wanted, str):
            return wanted
        address = f"/v1/series/{wanted['series_uid']}/slices/{wanted['slice']}/image"
        query = {"window": wanted["window"]}
        return small(client.request("GET", address, again=False, params=query, timeout=TIMEOUT).content)
    except KeysliceError:
        return None
    finally:
        done()


def small(png: bytes) -> str:
    """A PNG as a data URI of WebP, PICTURE_SIDE on its longer side at most."""
    picture = Image.open(io.BytesIO(png)).convert("L")
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE), Image.Resampling.BOX)
    out = io.BytesIO()
    picture.save(out, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"


def _pictures_of(path: Path) -> dict[tuple[Any, ...], str]:
    """The pictures of an older page, by what they show; none where no map is there."""
    try:
        points = points_of(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {_name(point): point["picture"] for point in points if point.get("picture")}


def _name(point: Point) -> tuple[Any, ...]:
    """A slice at a window, whatever its number: slices that come later move the numbers."""
    return point["sop_uid"], point["frame"], point["window"]


def _placed(points: Sequence[Point], projection: Projection) -> dict[str, Any]:
    for number, point in enumerate(points):
        point["pca"] = projection.pca[number].round(5).tolist()
        point["tsne"] = None if projection.tsne is None else projection.tsne[number].round(3).tolist()
    return {"pca_variance": projection.shares, "tsne": projection.tsne is not None, "points": points}
