"""What MkDocs does not do by itself: equations without a script, paths that break, decisions in the navigation."""

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

FENCE = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE_IN_CELL = re.compile(r"(?<=<code>)[^<]*(?=</code>[^\n]*</td>)")
SEPARATOR = re.compile(r"(/|\?|&amp;)(?=\w|\{)")


def on_config(config: Any) -> Any:
    """Decisions stand in the last section in the order of their numbers."""
    decisions = Path(config["docs_dir"]) / "decisions"
    (pages,) = config["nav"][-1].values()
    pages.append({"Decisions": [f"decisions/{path.name}" for path in sorted(decisions.glob("*.md"))]})
    return config


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fences of LaTeX become MathML, which browsers draw by themselves."""
    return FENCE.sub(
        lambda fence: f'<div class="equation">{convert(fence[1].strip(), display="block")}</div>', markdown
    )


def on_page_content(html: str, **_: Any) -> str:
    """Paths in tables may break behind their separators; names in tables break nowhere (site.css)."""
    return CODE_IN_CELL.sub(lambda code: SEPARATOR.sub(r"\1<wbr>", code[0]), html)
