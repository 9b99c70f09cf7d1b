"""`keyslice search`: slices like one that is here, or like one in a file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from service.schemas.search import Exclude, SearchAnswer
from service.terminal import AsJson, Service, asked, console, fail, say_json


def search(
    of: Annotated[str, typer.Argument(help="SeriesInstanceUID, or a slice in a file: DICOM, or PNG at a window")],
    slice: Annotated[int | None, typer.Argument(min=0, help="of the series, from 0")] = None,
    window: Annotated[str, typer.Option(help="that the slice is looked at in")] = "lung",
    k: Annotated[int, typer.Option("-k", min=1, help="how many")] = 10,
    exclude: Annotated[Exclude, typer.Option(help="slices of the series' own series, study or patient")] = "series",
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Print the nearest stored slices by cosine, the nearest first."""
    file = Path(of)
    if slice is None and not file.is_file():
        fail("expected a series and its slice's number, or a file")
    found = asked(
        service,
        lambda client: (
            client.similar_image(file, window=window, k=k)
            if slice is None
            else client.similar(of, slice, window, k=k, exclude=exclude)
        ),
    )
    if as_json:
        say_json(found)
    else:
        _print(found)


def _print(found: SearchAnswer) -> None:
    table = Table("cosine", "patient", "series", "slice", "window", "z, mm")
    for hit in found.hits:
        position = str(hit.slice), hit.window, f"{hit.z_mm:.1f}"
        table.add_row(f"{hit.score:.4f}", hit.patient_id, hit.series_uid, *position)
    console().print(table)
