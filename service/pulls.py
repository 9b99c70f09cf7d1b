"""A table of queries to a PACS: CSV, a query per row."""

import csv
import io
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from service.errors import BadExport, BadQuery
from service.remotes import DicomWeb, is_remote, parse_remote
from service.schemas.pulls import BadRow, PacsQuery

COLUMNS = list(PacsQuery.model_fields)


@dataclass(frozen=True)
class QueryTable:
    queries: list[PacsQuery]
    bad: list[BadRow]


def asked_of(uri: str, query: PacsQuery | None, table: str | None) -> dict[str, Any]:
    """What an export keeps of the queries to its server: nothing where it is none. Raises BadExport or BadQuery."""
    if not (is_remote(uri) and isinstance(parse_remote(uri), DicomWeb)):
        if query or table:
            raise BadExport("a query, but the export is no DICOMweb server")
        return {}
    if (query is None) == (table is None):
        raise BadExport("a DICOMweb server with both query and queries or none, expected one of them")
    found = QueryTable([query], []) if query else parse_queries((table or "").encode())
    bad = [each.model_dump() for each in found.bad]
    if not found.queries:
        raise BadQuery("no row of the table is a query", bad_rows=bad)
    return {"queries": [each.model_dump(exclude_defaults=True) for each in found.queries], "bad_rows": bad}


def parse_queries(table: bytes) -> QueryTable:
    """The table's queries, and its rows that are none. Raises BadQuery where the table is no such table."""
    try:
        reader = csv.reader(io.StringIO(table.decode("utf-8-sig"), newline=""), strict=True)
        numbered = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadQuery(f"the table of queries is not CSV in UTF-8: {type(error).__name__}") from error
    numbered = [(line, row) for line, row in numbered if any(row)]
    header = numbered[0][1] if numbered else []
    if not header or len(set(header)) != len(header) or not set(header) <= set(COLUMNS):
        raise BadQuery(
            f"the table's columns are not what may be asked, expected some of {', '.join(COLUMNS)}, each once"
        )
    found = QueryTable([], [])
    for line, row in numbered[1:]:
        query = _query(header, row)
        if isinstance(query, PacsQuery):
            found.queries.append(query)
        else:
            found.bad.append(BadRow(line=line, detail=query))
    if not found.queries and not found.bad:
        raise BadQuery("the table of queries is empty, expected a header and a row per query")
    return found


def _query(header: list[str], row: list[str]) -> PacsQuery | str:
    """The row as a query, or what is wrong with it."""
    if len(row) != len(header):
        return f"{len(row)} cells, expected {len(header)}"
    try:  # an empty cell does not narrow, and an empty modality means CT
        return PacsQuery.model_validate({name: cell for name, cell in zip(header, row, strict=True) if cell})
    except ValidationError as error:
        return "; ".join(
            ": ".join([*map(str, each["loc"]), each["msg"].removeprefix("Value error, ")])
            for each in error.errors(include_input=False)
        )
