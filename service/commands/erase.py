"""`keyslice erase`: a series or a patient out of every store of the running service."""

from typing import Annotated

import typer

from service.terminal import AsJson, Service, asked, fail, say_json


def erase(
    series_uid: Annotated[str | None, typer.Argument(help="SeriesInstanceUID")] = None,
    patient: Annotated[str | None, typer.Option(help="a patient's id: with every series")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Erase a series or a patient from archive, bags, index and catalog; print the receipt."""
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
    if as_json:
        say_json(receipt)
        return
    when = f"erased at {receipt.erased_at:%Y-%m-%d %H:%M} UTC" if receipt.erased_at else "still at work"
    typer.echo(f"receipt {receipt.erasure_id}: {receipt.series} series, {when}")
    for name, count in receipt.removed.items():
        typer.echo(f"  {count} {name}")
    if receipt.heads:
        typer.echo(f"trained on some of it, and left as they are: heads {', '.join(receipt.heads)}")
