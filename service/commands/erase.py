"""`keyslice erase`: a series or a patient out of every store of the running service."""

from typing import Annotated

import typer

from service.terminal import Service, asked, fail


def erase(
    series_uid: Annotated[str | None, typer.Argument(help="SeriesInstanceUID")] = None,
    patient: Annotated[str | None, typer.Option(help="a patient's id: with every series")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    service: Service = None,
) -> None:
    """Erase a series or a patient from archive, bags, index and catalog; print the receipt as JSON."""
    if (series_uid is None) == (patient is None):
        fail("expected a SeriesInstanceUID, or --patient with an id")
    what = "this series" if series_uid is not None else "this patient with every series"
    if not yes:
        typer.confirm(f"Erase {what} for good?", abort=True, err=True)
    receipt = asked(
        service,
        lambda client: (
            client.erase_series(series_uid) if series_uid is not None else client.erase_patient(patient or "")
        ),
    )
    typer.echo(receipt.model_dump_json(indent=1))
