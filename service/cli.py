"""The `keyslice` command: parse, one call, print."""

import logging
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError

from service.settings import Settings

app = typer.Typer(
    no_args_is_help=True, add_completion=True, help="An embedding feature store for CT. Research use only."
)


@app.command(epilog="Example: KEYSLICE_PORT=9000 keyslice up")
def up() -> None:
    """Serve: start API, worker and, unless KEYSLICE_BROKER_URL is set, a broker; Ctrl-C stops all."""
    from service.embedded import CannotStart
    from service.embedded import up as run

    logging.basicConfig(level=logging.INFO, format="keyslice: %(message)s")
    try:
        run(_settings())
    except CannotStart as error:
        _fail(str(error))


@app.command(epilog="Example: keyslice demo ~/ct/series.tar.xz --oneshot")
def demo(
    series: Annotated[
        Path | None, typer.Argument(help="directory, zip or tar of DICOM; a synthetic cohort if none")
    ] = None,
    oneshot: Annotated[bool, typer.Option("--oneshot", help="stop at the end instead of serving on")] = False,
) -> None:
    """Start the service and take a CT series from POST to prediction, attention and similar slices."""
    from service.demo import DemoFailed
    from service.demo import demo as run
    from service.embedded import CannotStart

    if series is not None and not series.exists():
        _fail(f"no such file or directory: {series}")
    try:
        run(_settings(), series, oneshot=oneshot)
    except (DemoFailed, CannotStart) as error:
        _fail(str(error), status=1)


@app.command(epilog="Example: keyslice fetch mambaout_tiny --revision <40-digit commit>")
def fetch(
    encoder: Annotated[str, typer.Argument(help="an encoder whose weights come from a hub")],
    revision: Annotated[str, typer.Option(help="the full commit of the hub repository; branches move")],
) -> None:
    """Download an encoder's weights into the weights directory, by pinned revision."""
    from models.fetch import CannotFetch, fetch_weights
    from models.specs import ENCODERS

    if encoder not in ENCODERS:
        _fail(f"no encoder {encoder!r}, expected one of {', '.join(ENCODERS)}")
    try:
        typer.echo(fetch_weights(ENCODERS[encoder], revision, _settings().weights_path))
    except CannotFetch as error:
        _fail(str(error))


def _settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        lines = [f"KEYSLICE_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in error.errors()]
        _fail("\n".join(lines))


def _fail(message: str, status: int = 2) -> NoReturn:
    typer.secho(message, fg="red", err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
