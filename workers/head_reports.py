"""What the service knows of a trained head beside what its bags know: table, encoder, versions, command."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from models.heads.options import HeadOptions
from service.storage.tables import HeadRow
from service.training import command_of


def completed(report: dict[str, Any], row: HeadRow, windows: Sequence[str]) -> dict[str, Any]:
    """The whole report of docs/heads.md, with the windows by their names."""
    table = row.targets
    shares = report["attention"]["by_window"]
    named = dict(zip(windows, shares.values(), strict=True)) if len(windows) == len(shares) else shares
    cohort = {
        "patients": report["patients"],
        "bags": report["bags"],
        "series": sum(len(uids) for _, uids, _ in table["rows"]),
    }
    name = None if row.name == row.head_id else row.name
    asked = {"name": name} | row.options | {"encoder": row.encoder_id, "splits_of": table.get("splits_of")}
    return report | {
        "by": table.get("by"),
        "cohort": cohort | report["cohort"],
        "warnings": table.get("warnings", []) + report["warnings"],
        "attention": {"by_window": named},
        "rows": {"line": table.get("lines")} | report["rows"],
        "encoder_id": row.encoder_id,
        "code_version": version("keyslice"),
        "command": command_of(asked, asdict(HeadOptions())),
        "table": table.get("table"),
    }
