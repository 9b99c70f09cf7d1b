"""`keyslice pseudonym`: what an original is called here."""

import sys
from typing import Annotated

import typer

from service.pseudonyms import Pseudonyms
from service.terminal import AsJson, fail, read_settings, say_json


def pseudonym(
    originals: Annotated[list[str] | None, typer.Argument(help="patient ids; lines of standard input if none")] = None,
    uid: Annotated[bool, typer.Option("--uid", help="they are UIDs")] = False,
    as_json: AsJson = False,
) -> None:
    """Print the pseudonyms of patient ids or UIDs, by KEYSLICE_PSEUDONYM_KEY, one a line. Asks no service."""
    pseudonyms = Pseudonyms.of(read_settings())
    if pseudonyms is None:
        fail("KEYSLICE_PSEUDONYM_KEY is not set, expected the service's")
    asked = originals or [line.strip() for line in sys.stdin if line.strip()]
    found = [pseudonyms.uid(each) if uid else pseudonyms.patient(each) for each in asked]
    if as_json:
        say_json([{"original": each, "pseudonym": name} for each, name in zip(asked, found, strict=True)])
        return
    for name in found:
        typer.echo(name)
