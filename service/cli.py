"""The `keyslice` command: parse, one call, print."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.table import Table

from models.heads.options import Baseline, HeadOptions, Network, Protocol, Task
from models.modes import COSINE, Mode, in_mode
from models.specs import SUFFIXES, EncoderSpec, LicenceForbids, MissingWeights, WrongWeights, check_licence
from models.zoo import encoders as all_encoders
from service.commands.audit import audit
from service.commands.check import check
from service.commands.doctor import doctor
from service.commands.embed import embed
from service.commands.erase import erase
from service.commands.features import features
from service.commands.index import index
from service.commands.keys import keys
from service.commands.predict import predict
from service.commands.pseudonym import pseudonym
from service.commands.receive import receive
from service.commands.search import search
from service.commands.serve import serve, work
from service.settings import Settings
from service.terminal import AsJson, Service, asked, console, fail, read_settings, say_json

HELP = """An embedding feature store for CT. Research use only.

Every command that answers takes --json: one JSON document on standard output. Progress and errors go to standard error.

Exit status 0: done; 1: the service or a store refused; 2: the command was wrong; 3: partly done, or a difference found.
"""

app = typer.Typer(no_args_is_help=True, add_completion=True, help=HELP)
_HEAD = HeadOptions()
NO_HEAD_OPTIONS = ("labels", "service", "output", "as_json")  # of `keyslice train`
encoders = typer.Typer(help="List encoders, measure how to run them, verify them.")
app.add_typer(encoders, name="encoders")
heads = typer.Typer(help="List the running service's heads, promote a version.")
app.add_typer(heads, name="heads")
app.add_typer(index, name="index")
app.add_typer(features, name="features")
app.add_typer(keys, name="keys")
app.add_typer(audit, name="audit")


@app.command(epilog="Example: KEYSLICE_PORT=9000 keyslice up")
def up() -> None:
    """Serve: start API, worker and, unless KEYSLICE_BROKER_URL is set, a broker; Ctrl-C stops all."""
    from service import logs
    from service.embedded import CannotStart
    from service.embedded import up as run

    settings = read_settings()
    logging.basicConfig(level=logging.INFO, format="keyslice: %(message)s")
    logs.set_up(settings)
    try:
        run(settings)
    except CannotStart as error:
        fail(str(error))


app.command(epilog="Example: KEYSLICE_PORT=9000 keyslice serve")(serve)


app.command(epilog="Example: KEYSLICE_BROKER_URL=redis://broker.example:6379/0 keyslice work")(work)


app.command(epilog="Example: keyslice receive --aet KEYSLICE --port 11112")(receive)


app.command(epilog="Example: keyslice search 1.2.840.113619.2.55.3.604 42 --window lung --exclude patient")(search)


app.command(epilog="Example: keyslice check --repair")(check)


app.command(epilog="Example: keyslice doctor --json")(doctor)


app.command(epilog="Example: keyslice erase 1.2.840.113619.2.55.3.604")(erase)


app.command(epilog="Example: keyslice embed /mnt/pacs/export --csv series.csv")(embed)


app.command(epilog="Example: keyslice pseudonym < ids.txt")(pseudonym)


app.command(epilog="Example: keyslice predict ~/ct/series.zip --head contrast")(predict)


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
        fail(f"no such file or directory: {series}")
    try:
        run(read_settings(), series, oneshot=oneshot)
    except (DemoFailed, CannotStart) as error:
        fail(str(error), status=1)


@app.command(epilog="Example: keyslice fetch mambaout_tiny --revision <40-digit commit>")
def fetch(
    encoder: Annotated[str, typer.Argument(help="an encoder whose weights come from a hub")],
    revision: Annotated[str, typer.Option(help="the full commit of the hub repository; branches move")],
    as_json: AsJson = False,
) -> None:
    """Download an encoder's weights into the weights directory, by pinned revision."""
    from models.fetch import CannotFetch, fetch_weights

    settings, spec = _encoder(encoder)
    try:
        path = fetch_weights(spec, revision, settings.weights_path)
    except CannotFetch as error:
        fail(str(error))
    if as_json:
        say_json({"encoder": spec.name, "revision": revision, "path": path})
    else:
        typer.echo(path)


@app.command(epilog="Example: keyslice pretrain --config run.toml --max-minutes 30")
def pretrain(
    config: Annotated[Path, typer.Option(help="the run as TOML; see docs/pretraining.md")],
    output: Annotated[Path | None, typer.Option(help="folder of checkpoints and metrics; the file's if none")] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="discard the folder's checkpoints, or go on from the last")
    ] = False,
    max_minutes: Annotated[float | None, typer.Option(min=0, help="end after so long, with a checkpoint")] = None,
    export: Annotated[str | None, typer.Option(help="export under this name, however far the run came")] = None,
    as_json: AsJson = False,
) -> None:
    """Pretrain an encoder, in as many pieces as it takes; at the end the service knows it.

    Ctrl-C ends the run after the step it is in, and the same command goes on from there.
    Several GPUs: torchrun --nproc-per-node 8 -m service.cli pretrain --config run.toml
    """
    from models.lecl.config import BadConfig, read_config

    logging.basicConfig(level=logging.INFO, format="keyslice: %(message)s")
    try:
        wanted = read_config(config)
    except BadConfig as error:
        fail(str(error))
    settings, base = _encoder(wanted.encoder.base)
    if wanted.encoder.start == "pretrained":
        _permitted(base.name)
    from models.lecl.train import ERRORS
    from models.lecl.train import pretrain as run

    try:
        result = run(
            wanted.writing_to(output) if output else wanted,
            settings.weights_path,
            fresh=fresh,
            max_seconds=None if max_minutes is None else max_minutes * 60,
            export=export,
            command=f"keyslice pretrain --config {config}",
        )
    except ERRORS as error:
        fail(str(error))
    if as_json and os.environ.get("RANK", "0") == "0":  # of torchrun's processes the first
        say_json(result)


@app.command(epilog="Example: keyslice train labels.csv --protocol nested --baseline mean --output head.json")
def train(
    labels: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="the labels table; see docs/heads.md")],
    name: Annotated[str | None, typer.Option(help="of which this head is the next version")] = None,
    encoder: Annotated[str | None, typer.Option(help="name or id; the service's own if none")] = None,
    task: Annotated[Task, typer.Option()] = _HEAD.task,
    network: Annotated[Network, typer.Option()] = _HEAD.network,
    protocol: Annotated[Protocol, typer.Option(help="of a table without a split column")] = _HEAD.protocol,
    folds: Annotated[int, typer.Option()] = _HEAD.folds,
    inner_folds: Annotated[int, typer.Option(help="of nested")] = _HEAD.inner_folds,
    epochs: Annotated[int, typer.Option()] = _HEAD.epochs,
    patience: Annotated[int, typer.Option(help="epochs without improvement")] = _HEAD.patience,
    batch_size: Annotated[int, typer.Option(help="bags")] = _HEAD.batch_size,
    learning_rate: Annotated[float, typer.Option()] = _HEAD.learning_rate,
    weight_decay: Annotated[float, typer.Option()] = _HEAD.weight_decay,
    dropout: Annotated[float, typer.Option()] = _HEAD.dropout,
    hidden: Annotated[int, typer.Option(help="size of an instance behind the first layer")] = _HEAD.hidden,
    attention: Annotated[int, typer.Option(help="size of the attention's hidden layer")] = _HEAD.attention,
    temperature_scaling: Annotated[bool, typer.Option()] = _HEAD.temperature_scaling,
    specificity: Annotated[float, typer.Option(help="at which sensitivity is told")] = _HEAD.specificity,
    baselines: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline", help=f"train this beside it, one of {', '.join(get_args(Baseline))}; may be repeated"
        ),
    ] = None,
    permutations: Annotated[int | None, typer.Option(help="trainings on shuffled labels")] = None,
    splits_of: Annotated[str | None, typer.Option(help="a head whose splits are used again")] = None,
    seed: Annotated[int, typer.Option()] = _HEAD.seed,
    service: Service = None,
    output: Annotated[Path | None, typer.Option(help="write the head with its report as JSON")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a head on a labels table, by the running service; show its figures."""
    options = {name: value for name, value in locals().items() if name not in NO_HEAD_OPTIONS}
    _train(labels, options, service, output, as_json)


@heads.callback(invoke_without_command=True, epilog="Example: keyslice heads --service http://127.0.0.1:9000")
def list_heads(context: typer.Context, service: Service = None, as_json: AsJson = False) -> None:
    """List every head: name and version, whether it is promoted, state, labels, AUROC."""
    if context.invoked_subcommand:
        return
    from service.training import heads_table

    found = asked(service, lambda client: list(client.heads()))
    if as_json:
        say_json(found)
    else:
        console().print(heads_table(found))


@heads.command(epilog="Example: keyslice heads promote nodules@2")
def promote(
    head: Annotated[str, typer.Argument(help="name@version, or an id")],
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """From now on the head's name alone means this version."""
    found = asked(service, lambda client: client.promote(head))
    if as_json:
        say_json(found)
    else:
        typer.echo(f"{found.name} is version {found.version}, head {found.head_id}")


@encoders.callback(invoke_without_command=True, epilog="Example: keyslice encoders --json")
def list_encoders(context: typer.Context, as_json: AsJson = False) -> None:
    """List every encoder: id, licence, whether its weights are here and how to get them."""
    if context.invoked_subcommand:
        return
    from service.deps import EncoderNames
    from service.routes.encoders import described

    settings = read_settings()
    found = described(EncoderNames(settings), settings)
    if as_json:
        say_json(found)
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
    console().print(table)
    typer.echo(
        f"Weights that are not here: `keyslice fetch NAME --revision COMMIT` brings a hub's; or put NAME with one of "
        f"{' '.join(SUFFIXES)} into {settings.weights_path}."
    )


@encoders.command(epilog="Example: keyslice encoders calibrate mambaout_tiny --mode bulk")
def calibrate(
    name: Annotated[str | None, typer.Argument(help="an encoder; the service's own if none")] = None,
    mode: Annotated[Mode | None, typer.Option(help="exact, fast or bulk; KEYSLICE_MODE's if none")] = None,
    again: Annotated[bool, typer.Option("--again", help="measure even what was measured before")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure which way of running an encoder is fastest on this machine, and use it from now on."""
    from models.calibrate import calibrate as measure
    from service import logs

    settings, spec = _permitted(name)
    logs.set_up(settings)
    logged = settings.log_format == "json"
    note = logging.getLogger("models.calibrate").info if logged else partial(typer.echo, err=as_json)
    mode = mode or settings.mode
    try:
        found = measure(spec, mode, settings.weights_path, note, again)
    except (MissingWeights, WrongWeights) as error:
        fail(str(error))
    if as_json:
        say_json({"encoder": spec.name, "mode": mode, **found})


@encoders.command(epilog="Example: keyslice encoders verify mambaout_tiny")
def verify(
    name: Annotated[str | None, typer.Argument(help="an encoder; the service's own if none")] = None,
    as_json: AsJson = False,
) -> None:
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
        fail(str(error))
    reference, embedding = stores.canaries.reference(encoder.id), encoder.encode(canary(encoder.spec))
    cosine = stores.canaries.record(encoder.id, embedding)
    difference = None if reference is None else float(np.abs(embedding.reshape(-1) - reference).max())
    if as_json:
        stored = {"cosine": None if reference is None else cosine, "largest_difference": difference}
        say_json({"encoder_id": encoder.id, **stored, "expected_cosine": COSINE[settings.mode]})
    elif reference is None:
        typer.echo(f"{encoder.id}: no canary was stored; this one is from now on")
    else:
        typer.echo(f"{encoder.id}: cosine {cosine:.7f} to the stored canary, largest difference {difference:.1e}")
    if cosine < COSINE[settings.mode]:
        fail(f"expected a cosine of {COSINE[settings.mode]} or more", status=1)


def _train(labels: Path, options: dict[str, Any], service: str | None, output: Path | None, as_json: bool) -> None:
    from service.training import show, write
    from service.training import train as run

    head = asked(service, lambda client: run(client, labels, options, console(to_stderr=True)))
    if output:
        write(head, output)
    if as_json:
        say_json(head)
    else:
        show(head, console())


def _encoder(name: str | None) -> tuple[Settings, EncoderSpec]:
    settings = read_settings()
    asked = name or settings.encoder
    known = all_encoders(settings.weights_path)
    if asked not in known:
        fail(f"no encoder {asked!r}, expected one of {', '.join(known)}")
    return settings, known[asked]


def _permitted(name: str | None) -> tuple[Settings, EncoderSpec]:
    settings, spec = _encoder(name)
    try:
        check_licence(spec, settings.noncommercial)
    except LicenceForbids as error:
        fail(str(error))
    return settings, spec


if __name__ == "__main__":
    app()
