"""A labels table: CSV with a row per patient, study or series and a column per label."""

import csv
import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import BadLabels
from service.storage.catalog import Catalog

KEY_COLUMNS = {"patient_id": "patient", "study_uid": "study", "series_uid": "series"}
SPLIT_COLUMN = "split"
SPLITS = ("train", "validation", "test")
CELLS = {"0": 0, "1": 1, "": None}
MIN_PATIENTS_PER_CLASS = 2  # one to train on, one to hold out
SHOWN_ROWS = 20


@dataclass(frozen=True)
class Labels:
    by: str  # "patient", "study" or "series"
    labels: list[str]
    lines: list[int]  # of the table, counted from 1; the header is line 1
    names: list[str]  # patient ids, study or series UIDs, one per row
    targets: list[list[int | None]]  # (rows, labels) of 0, 1 and None for unknown
    split: list[str] | None  # train, validation or test, one per row
    sha256: str  # of the table


@dataclass(frozen=True)
class Matched:
    """The rows whose bags are here, and what was left out."""

    labels: Labels
    kept: list[int]  # row numbers of the table's rows
    rows: list[tuple[str, list[str], list[int | None]]]  # (patient key, series UIDs, targets)
    warnings: list[dict[str, Any]]

    @property
    def patients(self) -> int:
        return len({patient for patient, _, _ in self.rows})

    def as_targets(self, splits: dict[str, Any] | None, splits_of: str | None) -> dict[str, Any]:
        """What a training needs of the table, as JSON; `splits` are those of the head `splits_of`, used again."""
        by_patient = self.labels.by == "patient"
        chosen = self.labels.split
        return {
            "by": self.labels.by,
            "rows": self.rows,
            "lines": [self.labels.lines[k] for k in self.kept],
            # What two heads know a row by: a patient by the opaque key.
            "units": [
                row[0] if by_patient else self.labels.names[k] for k, row in zip(self.kept, self.rows, strict=True)
            ],
            "split": [chosen[k] for k in self.kept] if chosen else None,
            "splits": splits,
            "splits_of": splits_of,
            "warnings": self.warnings,
            "table": {"sha256": self.labels.sha256, "lines": len(self.labels.names) + 1},
        }


def parse_labels(table: bytes, task: str) -> Labels:
    """Read the table. Raises BadLabels, which names rows by their number and never by their patient."""
    header, lines, rows = _read(table)
    columns = [k for k, name in enumerate(header) if k and name != SPLIT_COLUMN]
    labels = [header[k] for k in columns]
    if not labels or not all(labels) or len(set(header)) != len(header):
        raise BadLabels("expected at least one label column, each with a name of its own")
    if task == "binary" and len(labels) != 1:
        raise BadLabels(f"the table has {len(labels)} label columns, expected 1 for binary")
    names = [row[0] for row in rows]
    counts = Counter(names)
    bad = [not name or "\0" in name or len(name) > 200 for name in names]
    _refuse(lines, bad, "have no valid id")
    _refuse(lines, [counts[name] > 1 for name in names], f"name a {KEY_COLUMNS[header[0]]} named twice")
    cells = [[row[k] for k in columns] for row in rows]
    _refuse(lines, [not set(row) <= set(CELLS) for row in cells], "hold other labels than 0, 1 and empty for unknown")
    if task == "one_of_n":
        wrong = [row.count("1") != 1 or "" in row for row in cells]
        _refuse(lines, wrong, "have not exactly one 1 and 0 otherwise, as one_of_n expects")
    targets = [[CELLS[cell] for cell in row] for row in cells]
    split = _split(header, lines, rows)
    return Labels(KEY_COLUMNS[header[0]], labels, lines, names, targets, split, hashlib.sha256(table).hexdigest())


def match_labels(labels: Labels, catalog: Catalog, encoder_id: str) -> Matched:
    """The table's rows with their bags; those without a bag or a label are left out, with a warning.

    Raises BadLabels where too few are left.
    """
    found = catalog.labelled_embeddings(labels.by, labels.names, encoder_id)
    left_out = {
        "not_here": (f"name a {labels.by} that is not here", [name not in found for name in labels.names]),
        "not_embedded": (
            f"name a {labels.by} without an embedding of {encoder_id}",
            [name in found and not found[name] for name in labels.names],
        ),
        "no_label": ("have no known label", [not any(cell is not None for cell in row) for row in labels.targets]),
    }
    warnings = [
        {"code": code, "detail": _told(lines, what), "lines": lines}
        for code, (what, these) in left_out.items()
        if (lines := _where(labels.lines, these))
    ]
    gone = {line for warning in warnings for line in warning["lines"]}
    kept = [k for k, line in enumerate(labels.lines) if line not in gone]
    rows = []
    for k in kept:
        series = found[labels.names[k]]
        rows.append((series[0][0], [series_uid for _, series_uid in series], labels.targets[k]))
    mixed = [len({patient for patient, _ in found[labels.names[k]]}) > 1 for k in kept]
    _refuse([labels.lines[k] for k in kept], mixed, f"name a {labels.by} of several patients")
    matched = Matched(labels, kept, rows, warnings)
    _check_split(matched)
    _check_classes(matched)
    return matched


def _read(table: bytes) -> tuple[list[str], list[int], list[list[str]]]:
    """The header, and the rows' line numbers and cells; blank rows are left out."""
    try:
        every = list(csv.reader(io.StringIO(table.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadLabels(f"the labels table is not CSV in UTF-8: {type(error).__name__}") from error
    numbered = [(n, [cell.strip() for cell in row]) for n, row in enumerate(every, 1)]
    numbered = [(n, row) for n, row in numbered if any(row)]
    if len(numbered) < 2:
        raise BadLabels("the labels table is empty, expected a header and a row per patient, study or series")
    (_, header), *body = numbered
    if header[0] not in KEY_COLUMNS:
        raise BadLabels(f"the first column is {header[0][:50]!r}, expected {', '.join(KEY_COLUMNS)}")
    lines, rows = [n for n, _ in body], [row for _, row in body]
    _refuse(lines, [len(row) != len(header) for row in rows], f"have not {len(header)} cells")
    return header, lines, rows


def _split(header: list[str], lines: list[int], rows: list[list[str]]) -> list[str] | None:
    """The column `split`, where there is one; an empty cell is train."""
    if SPLIT_COLUMN not in header:
        return None
    split = [row[header.index(SPLIT_COLUMN)] or "train" for row in rows]
    _refuse(lines, [each not in SPLITS for each in split], f"have another split than {', '.join(SPLITS)}")
    return split


def _check_split(matched: Matched) -> None:
    """Raises BadLabels where a patient is on both sides, or a side that is asked for is empty."""
    split = matched.labels.split
    if split is None:
        return
    sides = defaultdict(set)
    for k, (patient, _, _) in zip(matched.kept, matched.rows, strict=True):
        sides[patient].add(split[k])
    straddling = [len(sides[patient]) > 1 for patient, _, _ in matched.rows]
    _refuse([matched.labels.lines[k] for k in matched.kept], straddling, "put one patient into several splits")
    here = {split[k] for k in matched.kept}
    if missing := (set(split) | {"train"}) - here:
        raise BadLabels(f"no bag is left for the split {', '.join(sorted(missing))}" + _left_out(matched))


def _check_classes(matched: Matched) -> None:
    """Raises BadLabels where there are too few patients, of what is not test, to train and hold out."""
    split = matched.labels.split
    rows = [row for k, row in zip(matched.kept, matched.rows, strict=True) if split is None or split[k] != "test"]
    patients = len({patient for patient, _, _ in rows})
    if patients < 2 * MIN_PATIENTS_PER_CLASS:
        expected = f"expected at least {2 * MIN_PATIENTS_PER_CLASS}"
        raise BadLabels(f"there are {patients} patients to train on, {expected}{_left_out(matched)}")
    for column, label in enumerate(matched.labels.labels):
        for value, kind in ((1, "positive"), (0, "negative")):
            count = len({patient for patient, _, target in rows if target[column] == value})
            if count < MIN_PATIENTS_PER_CLASS:
                expected = f"expected at least {MIN_PATIENTS_PER_CLASS}"
                raise BadLabels(f"label {label[:50]!r} has {count} {kind} patients, {expected}{_left_out(matched)}")


def _left_out(matched: Matched) -> str:
    return "".join(f"; {warning['detail']}" for warning in matched.warnings)


def _where(lines: Sequence[int], these: Iterable[bool]) -> list[int]:
    return [line for line, chosen in zip(lines, these, strict=True) if chosen]


def _told(lines: list[int], what: str) -> str:
    shown = ", ".join(map(str, lines[:SHOWN_ROWS])) + (", ..." if len(lines) > SHOWN_ROWS else "")
    return f"{len(lines)} rows of the labels table {what}: row {shown}"


def _refuse(lines: Sequence[int], these: Iterable[bool], what: str) -> None:
    if bad := _where(lines, these):
        raise BadLabels(_told(bad, what), rows=bad[:SHOWN_ROWS])
