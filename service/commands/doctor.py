"""`keyslice doctor`: whether this machine has what the service needs."""

import typer

from service.terminal import AsJson, console, read_settings, say_json

AILING = 3  # exit status


def doctor(as_json: AsJson = False) -> None:
    """Try versions, decoders, device, disk, each store, database, broker and encoder; exit status 3 where one fails."""
    from service.doctor import examine

    findings = []
    for finding in examine(read_settings()):
        findings.append(finding)
        if not as_json:
            mark = "[green]well[/]" if finding.well else "[red]ails[/]"
            console().print(f"{mark}  {finding.name:10}", end="")
            console().print(finding.found, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        say_json(findings)
    if not all(each.well for each in findings):
        raise typer.Exit(AILING)
