"""`keyslice index`: how the similarity index is, whether it is what the bags say, and making it anew."""

from typing import Annotated, Any

import typer
from rich.table import Table

from service.terminal import AsJson, console, fail, reaching_storage, read_settings, say_json

index = typer.Typer(no_args_is_help=True, help="The similarity index: figures, a check against the bags, a rebuild.")

DIFFERENT = 3  # exit status
GROUPS = 40  # of months and scanners that the table shows
Encoder = Annotated[str | None, typer.Option(help="id, as `keyslice index stats` lists it; every one if none")]


@index.command(epilog="Example: keyslice index stats --json")
def stats(as_json: AsJson = False) -> None:
    """Rows, disk, the ANN index and its measured recall, per encoder; how its embeddings change, by scanner."""
    from service.checking import index_stats
    from service.storage.stores import open_stores

    found = index_stats(open_stores(read_settings()))
    if as_json:
        say_json(found)
        return
    table = Table("encoder", "series", "rows", "waiting", "MB", "ANN index of", "recall at 10", "effort", box=None)
    for each in found:
        table.add_row(*map(_cell, _columns(each)))
    console().print(table)
    for each in found:
        _health(each["encoder_id"], each["health"])


@index.command(epilog="Example: keyslice index check --json")
def check(encoder: Encoder = None, as_json: AsJson = False) -> None:
    """Compare the index with the bags, row by row; exit status 3 where they differ."""
    from service.checking import check_index
    from service.storage.stores import open_stores

    stores = open_stores(read_settings())
    with reaching_storage():
        found = {each: check_index(each, stores) for each in _encoders(encoder, stores)}
    if as_json:
        told = {name: {"rows": one.rows, "waiting": one.waiting, **one.differences} for name, one in found.items()}
        say_json(told)
    for name, one in {} if as_json else found.items():
        typer.echo(f"{name}: {one.rows} rows, {one.waiting} bags waiting")
        for kind, rows in one.differences.items():
            for row in rows[:10]:
                typer.echo(f"  {kind}: {row}")
            if len(rows) > 10:
                typer.echo(f"  {kind}: {len(rows)} in all")
    if any(rows for one in found.values() for rows in one.differences.values()):
        raise typer.Exit(DIFFERENT)


@index.command(epilog="Example: keyslice index rebuild --encoder efficientnet_lite0@0123456789ab")
def rebuild(encoder: Encoder = None, as_json: AsJson = False) -> None:
    """Make the index anew from the bags; searches go on with the old one until the new one is whole."""
    import os
    import socket

    from service.indexing import rebuild_index
    from service.storage.stores import open_stores

    settings = read_settings()
    stores = open_stores(settings)
    made = {}
    for each in _encoders(encoder, stores):
        with reaching_storage():
            written = rebuild_index(each, stores, settings, f"{socket.gethostname()}:{os.getpid()}")
        if not written:
            fail("another writer is at work on the index; try again later", status=1)
        row = stores.indexes.get(each)
        made[each] = {"rows": stores.indexes.rows(each), "table": row and row.table_name}
        if not as_json:
            typer.echo(f"{each}: {made[each]['rows']} rows in {made[each]['table'] or 'no table'}")
    if as_json:
        say_json(made)


def _encoders(encoder: str | None, stores: Any) -> list[str]:
    known = stores.indexes.encoders()
    if encoder is not None and encoder not in known:
        fail(f"nothing is embedded by {encoder!r}; embedded by {', '.join(known) or 'none'}")
    return [encoder] if encoder else known


def _columns(each: dict[str, Any]) -> list[Any]:
    effort = each["effort"] and f"nprobes {each['effort']['nprobes']}, refine {each['effort']['refine']}"
    megabytes = round(each["bytes"] / 1e6, 1)
    return [
        each["encoder_id"] + (" (broken)" if each["broken"] else ""),
        each["series"],
        each["rows"],
        each["waiting"],
        megabytes,
        each["built_rows"],
        each["recall"] if each["recall"] is None else f"{each['recall']:.3f}",
        effort,
    ]


def _health(encoder_id: str, told: dict[str, Any]) -> None:
    if reference := told["reference"]:
        rank = _number(reference["effective_rank"], 1)
        say = f"first {reference['bags']} bags: norm {reference['norm']:.2f}, rank {rank}"
        typer.echo(f"\n{encoder_id}, {say}; drift is from these, in standard deviations")
        names = ("month", "manufacturer", "kernel", "bags", "norm", "spread", "drift", "rank", "drift")
        table = Table(*names, box=None)
        for each in told["by_scanner"][:GROUPS]:
            figures = (each["norm"], each["norm_spread"], each["norm_drift"])
            ranks = (each["effective_rank"], each["rank_drift"])
            table.add_row(
                *map(_cell, (each["month"], each["manufacturer"] or None, each["kernel"] or None, each["bags"])),
                *(_number(value, 2) for value in figures),
                *(_number(value, 1) for value in ranks),
            )
        console().print(table)
        if len(told["by_scanner"]) > GROUPS:
            typer.echo(f"{len(told['by_scanner'])} rows in all: --json has them")
    if days := told["canary"]:
        worst = min(days, key=lambda day: day["lowest_cosine"])
        checks = sum(day["checks"] for day in days)
        typer.echo(
            f"canary of {encoder_id}: {checks} checks, lowest cosine {worst['lowest_cosine']:.6f} on {worst['day']}"
        )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _cell(value: Any) -> str:
    return "-" if value is None else str(value)
