"""A labels table: CSV with a row per patient or series and a column per label."""

import csv
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from service.errors import BadLabels
from service.storage.catalog import Catalog

KEY_COLUMNS = {"patient_id": "patient", "series_uid": "series"}
MIN_PATIENTS_PER_CLASS = 2  # one to train on, one to hold out
SHOWN_ROWS = 20


@dataclass(frozen=True)
class Labels:
    by: str  # "patient" or "series"
    names: list[str]  # patient ids or series UIDs, one per row
    labels: list[str]
    targets: list[list[int]]  # (rows, labels) of 0 and 1


def parse_labels(table: bytes, one_of_n: bool) -> Labels:
    """Read the table. Raises BadLabels, which names rows by their number and never by their patient."""
    try:
        rows = list(csv.reader(io.StringIO(table.decode("utf-8-sig")), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadLabels(f"the labels table is not CSV in UTF-8: {type(error).__name__}") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if len(rows) < 2:
        raise BadLabels("the labels table is empty, expected a header and a row per patient or series")
    header = [cell.strip() for cell in rows[0]]
    if header[0] not in KEY_COLUMNS:
        raise BadLabels(f"the first column is {header[0][:50]!r}, expected patient_id or series_uid")
    labels = header[1:]
    if not labels or not all(labels) or len(set(labels)) != len(labels):
        raise BadLabels("expected at least one label column, each with a name of its own")
    _refuse((n for n, row in enumerate(rows[1:], 2) if len(row) != len(header)), f"have not {len(header)} cells")
    names = [row[0].strip() for row in rows[1:]]
    counts = Counter(names)
    _refuse((n for n, name in enumerate(names, 2) if not name or "\0" in name or len(name) > 200), "have no valid id")
    _refuse((n for n, name in enumerate(names, 2) if counts[name] > 1), "name a patient or series named twice")
    cells = [[cell.strip() for cell in row[1:]] for row in rows[1:]]
    _refuse((n for n, row in enumerate(cells, 2) if not set(row) <= {"0", "1"}), "hold other labels than 0 and 1")
    targets = [[int(cell) for cell in row] for row in cells]
    if one_of_n:
        _refuse((n for n, row in enumerate(targets, 2) if sum(row) != 1), "have not exactly one 1, as one_of_n expects")
    return Labels(KEY_COLUMNS[header[0]], names, labels, targets)


def match_labels(labels: Labels, catalog: Catalog, encoder_id: str) -> list[tuple[str, list[str], list[int]]]:
    """(patient key, series UIDs, targets) per row of the table. Raises BadLabels."""
    found = catalog.labelled_embeddings(labels.by, labels.names, encoder_id)
    _refuse((n for n, name in enumerate(labels.names, 2) if name not in found), f"name a {labels.by} that is not here")
    missing = (n for n, name in enumerate(labels.names, 2) if not found[name])
    _refuse(missing, f"name a {labels.by} without an embedding of {encoder_id}")
    rows = [
        (found[name][0][0], [series_uid for _, series_uid in found[name]], target)
        for name, target in zip(labels.names, labels.targets, strict=True)
    ]
    patients = {patient for patient, _, _ in rows}
    if len(patients) < 2 * MIN_PATIENTS_PER_CLASS:
        raise BadLabels(f"the table has {len(patients)} patients, expected at least {2 * MIN_PATIENTS_PER_CLASS}")
    for column, label in enumerate(labels.labels):
        for value, kind in ((1, "positive"), (0, "negative")):
            count = len({patient for patient, _, target in rows if target[column] == value})
            if count < MIN_PATIENTS_PER_CLASS:
                expected = f"expected at least {MIN_PATIENTS_PER_CLASS}"
                raise BadLabels(f"label {label[:50]!r} has {count} {kind} patients, {expected}")
    return rows


def _refuse(rows: Iterable[int], what: str) -> None:
    if bad := list(rows):
        shown = ", ".join(map(str, bad[:SHOWN_ROWS])) + (", ..." if len(bad) > SHOWN_ROWS else "")
        raise BadLabels(f"{len(bad)} rows of the labels table {what}: row {shown}", rows=bad[:SHOWN_ROWS])
