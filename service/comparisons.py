"""Two trained heads side by side on the patients that both were measured on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import HeadsDiffer
from service.storage.tables import HeadRow


def compare_heads(head: HeadRow, other: HeadRow) -> dict[str, Any]:
    """Every label that both heads have, head minus other; on test patients where both have some.

    Raises HeadsDiffer where patients, their labels or the labels' names are not the same.
    """
    from models.heads.comparison import Answers, compare  # brings scikit-learn

    part = "test" if all(_report(each)["evaluated"] == "test" for each in (head, other)) else "validation"
    labels = [label for label in head.labels if label in other.labels]
    if not labels:
        raise HeadsDiffer(f"the heads have no label in common: {head.labels} and {other.labels}")
    answer = {}
    for label in labels:
        units, *own = _said(head, label, part)
        other_units, *others = _said(other, label, part)
        place = {unit: k for k, unit in enumerate(other_units)}
        if set(units) != set(place):
            common = len(set(units) & set(place))
            raise HeadsDiffer(f"{common} of {len(units)} and {len(place)} rows are the same, expected all")
        order = np.array([place[unit] for unit in units], dtype=np.int64)
        truth, patients, probability, called = own
        if not np.array_equal(truth, others[0][order], equal_nan=True):
            raise HeadsDiffer(f"label {label[:50]!r} has other values in the other head's table")
        answer[label] = compare(
            truth,
            Answers(probability, called),
            Answers(others[2][order], others[3][order]),
            patients,
            head.options.get("specificity", 0.9),
            seed=0,
        )
    return {"head_id": head.head_id, "other_head_id": other.head_id, "evaluated": part, "labels": answer}


def _report(head: HeadRow) -> dict[str, Any]:
    if not head.report or "rows" not in head.report:
        raise HeadsDiffer(f"head {head.head_id} keeps no predictions of its patients; train it again")
    return head.report


def _said(head: HeadRow, label: str, part: str) -> tuple[list[str], *tuple[NDArray[Any], ...]]:
    """(units, truth, patients, probability, called) of the rows that this part of the plan predicted."""
    said = _report(head)["rows"][part][label]
    rows = [k for k, probability in enumerate(said["probability"]) if probability is not None]
    column = head.labels.index(label)
    cells = [head.targets["rows"][k][2][column] for k in rows]
    return (
        [head.targets["units"][k] for k in rows],
        np.array([np.nan if cell is None else cell for cell in cells], dtype=np.float64),
        np.array([head.targets["rows"][k][0] for k in rows]),
        np.array([said["probability"][k] for k in rows], dtype=np.float64),
        np.array([said["called"][k] for k in rows], dtype=bool),
    )
