"""`keyslice embed`: a directory or archive of a PACS, embedded series by series."""

import json
from pathlib import Path
from typing import Annotated

import typer

from service.terminal import Service, console, fail, read_settings

SOME_FAILED = 3  # exit status
INTERRUPTED = 130  # as shells have it for SIGINT


def embed(
    uri: Annotated[str, typer.Argument(help="directory, zip or tar, as a path or URI; see docs/exports.md")],
    encoder: Annotated[str | None, typer.Option(help="name or id; the service's own if none")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="find the series, embed none")] = False,
    csv: Annotated[Path | None, typer.Option("--csv", help="write the table of series there")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the export with all its series as JSON")] = False,
    service: Service = None,
) -> None:
    """Embed an export of a PACS, by the running service or by one of its own; exit status 3 where series failed.

    Ctrl-C stops it, and the same command goes on where it was.
    """
    from service.calling import CallFailed
    from service.embedded import CannotStart
    from service.exporting import a_service, run, summary, table, write_csv

    settings, progress = read_settings(), console(to_stderr=True)
    named = _uri(uri)
    if csv and (csv.is_dir() or not csv.absolute().parent.is_dir()):
        fail(f"expected a file in a directory that is there, found {csv}")
    asked = {"uri": named, "encoder": encoder, "dry_run": dry_run}
    own = False
    try:
        with a_service(settings, service, named) as (http, own):
            export = run(http, asked, progress)
            if csv:
                write_csv(http, export["export_id"], csv)
    except (CallFailed, CannotStart) as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        place = "It has stopped" if own else "The service goes on with it"
        fail(f"{place}; the same command goes on where it is.", status=INTERRUPTED)
    if as_json:
        typer.echo(json.dumps(export, indent=1))
    else:
        console().print(table(export))
        typer.echo("\n".join(summary(export)))
    if export["states"].get("failed"):
        raise typer.Exit(SOME_FAILED)


def _uri(named: str) -> str:
    """A path of this machine as a file: URI; the process ends where there is nothing."""
    from service.exports import SCHEMES

    scheme, colon, _ = named.partition("://")
    if colon and scheme.isalpha():
        if scheme not in SCHEMES:
            fail(f"no exports from {scheme}://, expected a path or one of {', '.join(SCHEMES)}")
        return named
    path = Path(named).absolute()
    if not path.exists():
        fail(f"no such file or directory: {named}")
    return path.as_uri()
