"""What was erased."""

from datetime import datetime

from pydantic import Field

from service.schemas.base import Schema


class Erasure(Schema):
    """A receipt. It names nobody: what was erased, whoever asked has named."""

    erasure_id: str
    asked_at: datetime
    erased_at: datetime | None = Field(description="null while it is still at work")
    series: int
    removed: dict[str, int] = Field(
        description="how many: rows by table of the catalog, archive_files, bags, heat_maps, index_rows, messages"
    )
    heads: list[str] = Field(description="ids of the heads that were trained on some of it, which stay as they are")
