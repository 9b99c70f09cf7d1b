"""A cohort's map as one HTML page that needs nothing else."""

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).resolve().parent.parent / "web" / "map.html"
DATA = re.compile(r'<script type="application/json" id="map">(.*?)</script>', re.DOTALL)


def map_page(told: Mapping[str, Any]) -> str:
    """`told` is what make_map() answers; names from files are data on the page, never markup."""
    data = json.dumps(told, separators=(",", ":")).replace("<", "\\u003c")
    title = escape(f"Map of {len(told['points'])} embeddings by {told['encoder_id']}")
    page = TEMPLATE.read_text(encoding="utf-8").replace("<title>TITLE</title>", f"<title>{title}</title>")
    return DATA.sub(lambda _: f'<script type="application/json" id="map">{data}</script>', page, count=1)


def points_of(page: str) -> list[dict[str, Any]]:
    """The points of a page that map_page() made. Raises ValueError for another page."""
    found = DATA.search(page)
    if found is None:
        raise ValueError("no map on this page")
    try:
        return list(json.loads(found[1])["points"])
    except (KeyError, TypeError) as error:
        raise ValueError("no points in this map") from error
