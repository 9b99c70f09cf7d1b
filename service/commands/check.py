"""`keyslice check`: whether archive, bags, index and catalog say the same, and mending what can be mended."""

from contextlib import nullcontext
from typing import Annotated

import typer

from service.terminal import AsJson, console, reaching_storage, read_settings, say_json

DIFFERENT = 3  # exit status
SHOWN = 10  # differences of a kind that are listed


def check(
    repair: Annotated[bool, typer.Option("--repair", help="mend what can be mended")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="look for files and bags, and do not read them")] = False,
    as_json: AsJson = False,
) -> None:
    """Compare archive, bags, index and catalog; exit status 3 where a difference is left.

    Works on the data directory, beside a running service too: what came in the last ten minutes may be on its way and
    is left for the next check.
    """
    from service.consistency import Report
    from service.consistency import check as run
    from service.storage.stores import open_stores

    settings = read_settings()
    stores = open_stores(settings)
    stderr = console(to_stderr=True)
    with reaching_storage(), stderr.status("check") if stderr.is_terminal else nullcontext() as status:

        def seen(report: Report) -> None:
            if status:
                status.update(f"{report.series} series, {report.bags} bags; {len(report.differences)} differences")

        report = run(stores, settings, repair=repair, checksums=not quick, seen=seen)
    stores.close()
    if as_json:
        say_json(report)
    else:
        typer.echo(
            f"{report.series} series of {report.files} files, {report.bags} bags, {report.rows} rows of the index"
        )
        kinds = sorted({each.kind for each in report.differences})
        for kind in kinds:
            mine = [each for each in report.differences if each.kind == kind]
            for each in mine[:SHOWN]:
                typer.echo(f"  {kind}: {each.where}: {each.found}" + ("; mended" if each.mended else ""))
            if len(mine) > SHOWN:
                typer.echo(f"  {kind}: {len(mine)} in all; --json has them")
        left = sum(not each.mended for each in report.differences)
        typer.echo(f"{len(report.differences)} differences, {left} left" if kinds else "nothing differs")
    if any(not each.mended for each in report.differences):
        raise typer.Exit(DIFFERENT)
