"""`keyslice features`: a cohort's features as a file, and as a map."""

from pathlib import Path
from typing import Annotated, Any

import typer

from service.features.names import SUFFIXES, FormatName, format_of
from service.schemas.features import DRAWN, MOST_DRAWN
from service.terminal import AsJson, Service, asked, console, fail, say_json

features = typer.Typer(no_args_is_help=True, help="Take a cohort's features away.")
INCOMPLETE = 3  # exit status
ENDINGS = ", ".join(f"{suffix} is {name}" for name, suffix in SUFFIXES.items())

Many = list[str] | None
PatientId = Annotated[Many, typer.Option("--patient-id", help="may be repeated")]
StudyUid = Annotated[Many, typer.Option("--study-uid", help="may be repeated")]
SeriesUid = Annotated[Many, typer.Option("--series-uid", help="may be repeated")]
DateFrom = Annotated[str | None, typer.Option(help="of the study, 2001-01-31")]
DateTo = Annotated[str | None, typer.Option(help="of the study, that day included")]
Condition = Annotated[str | None, typer.Option()]
Verdict = Annotated[str | None, typer.Option(help="accepted, accepted_with_warnings or rejected")]
EncoderName = Annotated[str | None, typer.Option("--encoder", help="name or id; the service's own if none")]


@features.callback()
def noun() -> None:
    """Take a cohort's features away."""


@features.command(epilog="Example: keyslice features get chest.parquet --body-part chest --date-from 2001-01-01")
def get(
    path: Annotated[Path, typer.Argument(help="the file to write; see docs/features.md")],
    form: Annotated[FormatName | None, typer.Option("--format", help=f"by the file's name if none: {ENDINGS}")] = None,
    encoder: EncoderName = None,
    window: Annotated[Many, typer.Option("--window", help="may be repeated; all if none")] = None,
    patient_id: PatientId = None,
    study_uid: StudyUid = None,
    series_uid: SeriesUid = None,
    date_from: DateFrom = None,
    date_to: DateTo = None,
    modality: Condition = None,
    body_part: Condition = None,
    manufacturer: Condition = None,
    kernel: Condition = None,
    verdict: Verdict = None,
    patient_ids: Annotated[bool, typer.Option("--patient-ids", help="patients' ids instead of opaque keys")] = False,
    as_json: AsJson = False,
    service: Service = None,
) -> None:
    """Write a cohort's features, with their receipts, to a file: all of them, or no file."""
    from service.features.download import download

    form = form or format_of(path)
    if form is None:
        fail(f"{path.name} says no format: give --format, one of {', '.join(SUFFIXES)}")
    _writable(path)
    query = _query(locals()) | {"format": form, "window": window or []}
    said = asked(service, lambda client: download(client, query, path, console(to_stderr=True)))
    if as_json:
        say_json(said)
    else:
        typer.echo(f"{path}: {said['slices']} slices of {said['series']} series, {said['bytes'] / 1e6:.1f} MB")


@features.command("map", epilog="Example: keyslice features map --out chest.html --body-part CHEST --window lung")
def draw_map(
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("map.html"),
    limit: Annotated[
        int, typer.Option(min=1, max=MOST_DRAWN, help="slices at a window, drawn from all that meet the filter")
    ] = DRAWN,
    seed: Annotated[int, typer.Option(min=0, help="of the draw and of t-SNE")] = 0,
    encoder: EncoderName = None,
    window: Annotated[Many, typer.Option("--window", help="may be repeated; all if none")] = None,
    patient_id: PatientId = None,
    study_uid: StudyUid = None,
    series_uid: SeriesUid = None,
    date_from: DateFrom = None,
    date_to: DateTo = None,
    modality: Condition = None,
    body_part: Condition = None,
    manufacturer: Condition = None,
    kernel: Condition = None,
    verdict: Verdict = None,
    patient_ids: Annotated[bool, typer.Option("--patient-ids", help="patients' ids instead of opaque keys")] = False,
    as_json: AsJson = False,
    service: Service = None,
) -> None:
    """Write one page that shows a cohort's embeddings in two dimensions, with pictures; works without a network.

    Exit status 3 where pictures are missing.
    """
    from service.features.cohort_map import make_map, without_pictures

    _writable(out)
    query = _query(locals()) | {"count": limit, "seed": seed, "window": window or []}
    told = asked(service, lambda client: make_map(client, query, out, console(to_stderr=True)))
    points = told["points"]
    if as_json:
        say_json(without_pictures(told))
    else:
        typer.echo(f"{out}: {len(points)} of {told['instances']} instances, {told['series']} series")
    if missing := sum(point["picture"] is None for point in points):
        fail(f"{missing} of {len(points)} pictures are missing: the service has none for them", status=INCOMPLETE)


def _query(options: dict[str, Any]) -> dict[str, Any]:
    """The filter of a command's options, as GET /v1/features takes it."""
    lists = ("patient_id", "study_uid", "series_uid")
    words = ("encoder", "date_from", "date_to", "modality", "body_part", "manufacturer", "kernel", "verdict")
    query = {name: options[name] for name in (*lists, *words) if options[name] is not None}
    return query | ({"patients": "id"} if options["patient_ids"] else {})


def _writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        fail(f"expected a file in a directory that is there, found {path}")
