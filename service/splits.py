"""Splits of a head used again, so that heads are compared on the same patients."""

from typing import Any

from service.errors import BadLabels
from service.labels import Matched
from service.storage.tables import HeadRow


def splits_of(head: HeadRow, matched: Matched) -> dict[str, Any]:
    """The head's splits for the rows of another table, patient by patient.

    Raises BadLabels where the table has a column of its own for that, or patients that the head does not know.
    """
    report = head.report or {}
    if "splits" not in report:
        raise BadLabels(f"head {head.head_id} has no splits in its report")
    if matched.labels.split is not None:
        raise BadLabels("found both splits_of and a split column, expected one of them")
    known = {row[0]: k for k, row in enumerate(head.targets["rows"])}
    unknown = {patient for patient, _, _ in matched.rows} - known.keys()
    if unknown:
        raise BadLabels(f"{len(unknown)} patients are in no split of head {head.head_id}")
    chosen = [known[patient] for patient, _, _ in matched.rows]

    def again(parts: list[Any]) -> list[Any]:
        return [parts[k] for k in chosen]

    splits = report["splits"]
    folds = {part for part in splits["deployed"] if isinstance(part, int)}
    if missing := folds - set(again(splits["deployed"])):
        raise BadLabels(f"no patient of the table is in {len(missing)} of {len(folds)} folds of head {head.head_id}")
    return {
        "protocol": splits["protocol"],
        "deployed": again(splits["deployed"]),
        "outer": [again(parts) for parts in splits["outer"]],
    }
