"""Tables of annotated lesions."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from models.lecl.sources import BadSource, Box

COLUMNS = ("sop_uid", "x0", "y0", "x1", "y1")

Line = tuple[int, dict[str, str]]  # the row's line in its file, its cells by column
Boxes = dict[str, list[tuple[int, Box]]]  # by sop_uid; the line each stands on


def read_boxes(path: Path) -> Boxes:
    """The boxes of a CSV with COLUMNS, in pixels as Box has them. Raises BadSource."""
    boxes: Boxes = defaultdict(list)
    for line, cells in read_table(path, COLUMNS):
        numbers = [number(cells[column], f"{path.name} line {line}: {column}") for column in COLUMNS[1:]]
        boxes[cells["sop_uid"]].append((line, Box(*numbers)))
    return dict(boxes)


def read_table(path: Path, columns: Sequence[str]) -> Iterator[Line]:
    """The rows of a CSV that has at least these columns. Raises BadSource, quoting no cell: it may name someone."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            table = csv.DictReader(file, skipinitialspace=True)
            found = table.fieldnames or []
            if missing := [column for column in columns if column not in found]:
                raise BadSource(
                    f"{path.name} lacks {', '.join(missing)}: found {len(found)} columns, of them "
                    f"{', '.join(each for each in columns if each in found) or 'none'} of {', '.join(columns)}"
                )
            for cells in table:
                yield table.line_num, {column: (cells[column] or "").strip() for column in columns}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise BadSource(f"no file {path.name}, expected a table with {', '.join(columns)}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadSource(f"{path.name} is no CSV in UTF-8: {type(error).__name__}") from error


def number(text: str, where: str) -> float:
    """The cell's finite number. Raises BadSource."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadSource(f"{where} is {'text' if text else 'empty'}, expected a finite number")
    return value


def inside(box: Box, rows: int, columns: int, where: str) -> Box:
    """The box, if it is one and lies in a slice of this size. Raises BadSource."""
    found = f"{where}: box x {box.x0:g} to {box.x1:g}, y {box.y0:g} to {box.y1:g}"
    if box.x0 >= box.x1 or box.y0 >= box.y1:
        raise BadSource(f"{found}, expected x0 < x1 and y0 < y1")
    if box.x0 < 0 or box.y0 < 0 or box.x1 > columns - 1 or box.y1 > rows - 1:
        raise BadSource(f"{found}, expected x within 0 to {columns - 1} and y within 0 to {rows - 1}")
    return box
