"""`keyslice predict`: from DICOM to a head's predictions, with or without a service running."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.errors import KeysliceError
from service.terminal import AsJson, Service, console, fail, read_settings, say_json, told

if TYPE_CHECKING:
    from rich.console import Console

    from service.client import Keyslice
    from service.schemas.series import UploadReceived

SOME_FAILED = 3  # exit status
USABLE = ("embedded", "indexed")


def predict(
    series: Annotated[Path, typer.Argument(help="directory, zip or tar of DICOM, of one patient or several")],
    head: Annotated[str, typer.Option(help="name, name@version or id; `keyslice heads` lists them")],
    as_json: AsJson = False,
    service: Service = None,
) -> None:
    """Predict for each patient of some DICOM, by the running service or by one of its own.

    A patient's prediction reads all of their accepted series that are here. Exit status 3 where a series failed or was
    rejected.
    """
    from service.embedded import CannotStart
    from service.watched import a_service

    if not series.exists():
        fail(f"no such file or directory: {series}")
    progress = console(to_stderr=True)
    try:
        with a_service(read_settings(), service) as (client, _):
            named = client.get_head(head)
            received = client.upload(series, encoder=named.encoder_id)
            patients, left_out = _embedded(client, received, progress)
            found = [client.predict(patient, head=named) for patient in patients]
    except KeysliceError as error:
        fail(told(error), status=1)
    except CannotStart as error:
        fail(str(error), status=1)
    if as_json:
        say_json(found)
    else:
        typer.echo("\n\n".join(map(str, found)))
    if left_out:
        fail("\n".join(left_out), status=SOME_FAILED)


def _embedded(client: "Keyslice", received: "UploadReceived", progress: "Console") -> tuple[list[str], list[str]]:
    """Whose series are embedded, and of every other series what became of it."""
    from service.errors import JobFailed
    from service.watched import watched

    with watched(progress) as show, suppress(JobFailed):  # some of its series may be there
        client.wait(received, progress=show)
    rows = [client.get_series(each.series_uid) for each in received.series]
    usable = [row for row in rows if row.state in USABLE]
    left_out = [f"series {row.series_uid} is {row.state}" + _why(row.error) for row in rows if row not in usable]
    return sorted({row.patient_id for row in usable}), left_out


def _why(error: str | None) -> str:
    return f": {error}" if error else ""
