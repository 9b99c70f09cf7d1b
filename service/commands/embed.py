"""`keyslice embed`: a directory, archive, bucket or server of a PACS, embedded series by series."""

from pathlib import Path
from typing import Annotated, Any

import typer

from service.errors import KeysliceError
from service.terminal import AsJson, Service, console, fail, read_settings, say_json, told

SOME_FAILED = 3  # exit status
INTERRUPTED = 130  # as shells have it for SIGINT


def embed(
    uri: Annotated[str, typer.Argument(help="directory, zip or tar, s3:// or dicomweb+https://")],
    encoder: Annotated[str | None, typer.Option(help="name or id; the service's own if none")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="find the series, embed none")] = False,
    query: Annotated[
        list[str] | None,
        typer.Option(help="of a DICOMweb server, as in patient_id=P1; may be given for several fields"),
    ] = None,
    queries: Annotated[Path | None, typer.Option(help="several of them: a CSV with the fields as its header")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="write the table of series there")] = None,
    as_json: AsJson = False,
    service: Service = None,
) -> None:
    """Embed an export of a PACS, by the running service or by one of its own.

    Exit status 3 where series failed or were rejected; what is no slice of a CT is set aside, and is no failure.

    Ctrl-C stops it, and the same command goes on where it was.
    """
    from service.embedded import CannotStart
    from service.exporting import root_of, run, summary, table
    from service.watched import a_service

    settings, progress = read_settings(), console(to_stderr=True)
    named = _uri(uri)
    if csv and (csv.is_dir() or not csv.absolute().parent.is_dir()):
        fail(f"expected a file in a directory that is there, found {csv}")
    asked = {"uri": named, "encoder": encoder, "dry_run": dry_run, **_asked(query, queries)}
    own = True  # until a running one has answered
    try:
        with a_service(settings, service, root_of(named)) as (client, own):
            export = run(client, asked, progress)
            if csv:
                client.export_table(export.export_id, csv)
    except KeysliceError as error:
        fail(told(error), status=1)
    except CannotStart as error:
        fail(str(error), status=1)
    except KeyboardInterrupt:
        ended = "Interrupted: the export has stopped" if own else "Interrupted: the service goes on with the export"
        fail(f"{ended}; the same command goes on where it is.", status=INTERRUPTED)
    if as_json:
        say_json(export)
    else:
        console().print(table(export))
        typer.echo("\n".join(summary(export)))
    if export.states.keys() & {"failed", "rejected"} or export.bad_rows:
        raise typer.Exit(SOME_FAILED)


def _asked(query: list[str] | None, queries: Path | None) -> dict[str, Any]:
    """What is asked of a server; the process ends where it cannot be read."""
    if queries and not queries.is_file():
        fail(f"no such file: {queries}")
    if unnamed := [each for each in query or [] if "=" not in each]:
        fail(f"expected a query as FIELD=VALUE, found {len(unnamed)} without =")
    named = dict(each.split("=", 1) for each in query or [])
    table = queries.read_bytes().decode("utf-8", "replace") if queries else None
    return {"query": named or None, "queries": table}


def _uri(named: str) -> str:
    """A path of this machine as a file: URI; the process ends where there is nothing."""
    from service.exports import SCHEMES
    from service.remotes import BadAddress, is_remote, parse_remote

    scheme, colon, _ = named.partition("://")
    if scheme == "file" and colon:
        return named
    if colon and scheme.isalpha() and scheme not in SCHEMES:
        fail(f"no exports from {scheme}://, expected a path or one of {', '.join(SCHEMES)}")
    if is_remote(named):
        try:
            return str(parse_remote(named))
        except BadAddress as error:
            fail(str(error))
    path = Path(named).absolute()
    if not path.exists():
        fail(f"no such file or directory: {named}")
    return path.as_uri()
