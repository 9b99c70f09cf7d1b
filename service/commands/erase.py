"""`keyslice erase`: a series or a patient out of every store of the running service."""

import json
from typing import Annotated
from urllib.parse import quote

import typer

from service.terminal import Service, asked, fail


def erase(
    series_uid: Annotated[str | None, typer.Argument(help="SeriesInstanceUID")] = None,
    patient: Annotated[str | None, typer.Option(help="a patient's id: with every series")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    service: Service = None,
) -> None:
    """Erase a series or a patient from archive, bags, index and catalog; print the receipt as JSON."""
    from service.calling import call

    if (series_uid is None) == (patient is None):
        fail("expected a SeriesInstanceUID, or --patient with an id")
    what = "this series" if series_uid is not None else "this patient with every series"
    if not yes:
        typer.confirm(f"Erase {what} for good?", abort=True, err=True)
    path = (
        f"series/{quote(series_uid or '', safe='')}" if series_uid is not None else f"patients/{quote(patient or '')}"
    )
    typer.echo(json.dumps(asked(service, lambda http: call(http, "DELETE", f"/v1/{path}")), indent=1))
