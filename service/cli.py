"""The `keyslice` command: parse, one call, print."""

import logging
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from models.modes import COSINE, Mode, in_mode
from models.specs import SUFFIXES, EncoderSpec, LicenceForbids, MissingWeights, WrongWeights, check_licence
from models.zoo import ENCODERS
from service.settings import Settings

app = typer.Typer(
    no_args_is_help=True, add_completion=True, help="An embedding feature store for CT. Research use only."
)
encoders = typer.Typer(help="List encoders, measure how to run them, verify them.")
app.add_typer(encoders, name="encoders")


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

    settings, spec = _encoder(encoder)
    try:
        typer.echo(fetch_weights(spec, revision, settings.weights_path))
    except CannotFetch as error:
        _fail(str(error))


@encoders.callback(invoke_without_command=True, epilog="Example: keyslice encoders --json")
def list_encoders(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="as GET /v1/encoders answers")] = False
) -> None:
    """List every encoder: id, licence, whether its weights are here and how to get them."""
    if context.invoked_subcommand:
        return
    from service.deps import EncoderNames
    from service.routes.encoders import described

    settings = _settings()
    found = described(EncoderNames(settings), settings)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    table = Table("encoder", "dim", "input", "licence", "weights", box=None)
    for each in found.encoders:
        table.add_row(
            each.name + (" (default)" if each.default else ""),
            str(each.dim),
            " x ".join(map(str, each.input_shape)),
            each.licence + ("" if each.permitted else "; needs KEYSLICE_NONCOMMERCIAL=true"),
            f"{each.encoder_id}, {each.runtime} {each.precision}" if each.encoder_id else f"not here; {each.source}",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    typer.echo(
        f"Weights that are not here: `keyslice fetch NAME --revision COMMIT` brings a hub's; or put NAME with one of "
        f"{' '.join(SUFFIXES)} into {settings.weights_path}."
    )


@encoders.command(epilog="Example: keyslice encoders calibrate mambaout_tiny --mode bulk")
def calibrate(
    name: Annotated[str | None, typer.Argument(help="an encoder; the service's own if none")] = None,
    mode: Annotated[Mode | None, typer.Option(help="exact, fast or bulk; KEYSLICE_MODE's if none")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure even what was measured before")] = False,
) -> None:
    """Measure which way of running an encoder is fastest on this machine, and use it from now on."""
    from models.calibrate import calibrate as measure

    settings, spec = _permitted(name)
    try:
        measure(spec, mode or settings.mode, settings.weights_path, typer.echo, again)
    except (MissingWeights, WrongWeights) as error:
        _fail(str(error))


@encoders.command(epilog="Example: keyslice encoders verify mambaout_tiny")
def verify(name: Annotated[str | None, typer.Argument(help="an encoder; the service's own if none")] = None) -> None:
    """Embed the canary slice again and compare it with the stored embedding; exit status 1 where they differ."""
    import numpy as np

    from models.load import canary, load_encoder
    from models.runtimes import CannotRun
    from service.storage.stores import open_stores

    settings, spec = _permitted(name)
    stores = open_stores(settings)
    try:
        encoder = load_encoder(in_mode(spec, settings.mode, settings.weights_path), settings.weights_path)
    except (MissingWeights, WrongWeights, CannotRun) as error:
        _fail(str(error))
    reference, embedding = stores.canaries.reference(encoder.id), encoder.encode(canary(encoder.spec))
    cosine = stores.canaries.record(encoder.id, embedding)
    if reference is None:
        typer.echo(f"{encoder.id}: no canary was stored; this one is from now on")
        return
    difference = np.abs(embedding.reshape(-1) - reference).max()
    typer.echo(f"{encoder.id}: cosine {cosine:.7f} to the stored canary, largest difference {difference:.1e}")
    if cosine < COSINE[settings.mode]:
        _fail(f"expected a cosine of {COSINE[settings.mode]} or more", status=1)


def _encoder(name: str | None) -> tuple[Settings, EncoderSpec]:
    settings = _settings()
    asked = name or settings.encoder
    if asked not in ENCODERS:
        _fail(f"no encoder {asked!r}, expected one of {', '.join(ENCODERS)}")
    return settings, ENCODERS[asked]


def _permitted(name: str | None) -> tuple[Settings, EncoderSpec]:
    settings, spec = _encoder(name)
    try:
        check_licence(spec, settings.noncommercial)
    except LicenceForbids as error:
        _fail(str(error))
    return settings, spec


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
