"""Two things that MkDocs asks of us: equations without a script, and every decision in the navigation."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fences of LaTeX become MathML, which browsers draw by themselves."""
    return FENCE.sub(
        lambda fence: f'<div class="equation">{convert(fence[1].strip(), display="block")}</div>', markdown
    )


def on_config(config: Any) -> Any:
    """Decisions stand in the last section in the order of their numbers."""
    decisions = Path(config["docs_dir"]) / "decisions"
    (pages,) = config["nav"][-1].values()
    pages.append({"Decisions": [f"decisions/{path.name}" for path in sorted(decisions.glob("*.md"))]})
    return config
