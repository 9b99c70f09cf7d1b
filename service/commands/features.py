"""`keyslice features`: a cohort's features as a file, and as a map."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from service.features.formats import FORMATS, FormatName
from service.terminal import Service, asked, console, fail

features = typer.Typer(no_args_is_help=True, help="Take a cohort's features away.")
SUFFIXES = ", ".join(f"{form.suffix} is {name}" for name, form in FORMATS.items())

Many = list[str] | None
PatientId = Annotated[Many, typer.Option("--patient-id", help="may be repeated")]
StudyUid = Annotated[Many, typer.Option("--study-uid", help="may be repeated")]
SeriesUid = Annotated[Many, typer.Option("--series-uid", help="may be repeated")]
DateFrom = Annotated[str | None, typer.Option(help="of the study, 2001-01-31")]
DateTo = Annotated[str | None, typer.Option(help="of the study, that day included")]
Condition = Annotated[str | None, typer.Option()]
Verdict = Annotated[str | None, typer.Option(help="accepted, accepted_with_warnings or rejected")]
EncoderName = Annotated[str | None, typer.Option("--encoder", help="name or id; the service's own if none")]
AsJson = Annotated[bool, typer.Option("--json", help="say what was written as JSON")]


@features.callback()
def noun() -> None:
    """Take a cohort's features away."""


@features.command(epilog="Example: keyslice features get chest.parquet --body-part chest --date-from 2001-01-01")
def get(
    path: Annotated[Path, typer.Argument(help="the file to write; see docs/features.md")],
    form: Annotated[FormatName | None, typer.Option("--format", help=f"by the file's name if none: {SUFFIXES}")] = None,
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
    from service.features.client import download, format_of

    form = form or format_of(path)
    if form is None:
        fail(f"{path.name} says no format: give --format, one of {', '.join(FORMATS)}")
    _writable(path)
    query = _query(locals()) | {"format": form, "window": window or []}
    said = asked(service, lambda http: download(http, query, path, console(to_stderr=True)))
    if as_json:
        typer.echo(json.dumps(said))
    else:
        typer.echo(f"{path}: {said['slices']} slices of {said['series']} series, {said['bytes'] / 1e6:.1f} MB")


def _query(options: dict[str, Any]) -> dict[str, Any]:
    """The filter of a command's options, as GET /v1/features takes it."""
    lists = ("patient_id", "study_uid", "series_uid")
    words = ("encoder", "date_from", "date_to", "modality", "body_part", "manufacturer", "kernel", "verdict")
    query = {name: options[name] for name in (*lists, *words) if options[name] is not None}
    return query | ({"patients": "id"} if options["patient_ids"] else {})


def _writable(path: Path) -> None:
    if path.is_dir() or not path.absolute().parent.is_dir():
        fail(f"expected a file in a directory that is there, found {path}")
