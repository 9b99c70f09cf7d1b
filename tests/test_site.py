"""The documentation as a site: built without a warning, and read without a network."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a page loads by itself, other than a link that somebody follows.
LOADED = re.compile(r'<(?:script|img|iframe)\b[^>]*\bsrc="(https?:[^"]+)|<link\b[^>]*\bhref="(https?:[^"]+)')


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does; strict, so a warning fails it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site(site):
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}

    built = {path.relative_to(site) for path in site.rglob("*.html")}

    assert built - pages == {Path("404.html")}
    assert pages <= built


def test_no_page_loads_anything_from_elsewhere(site):
    pages = {str(page.relative_to(site)): LOADED.findall(page.read_text()) for page in site.rglob("*.html")}
    styles = [
        sheet.name
        for sheet in site.rglob("*.css")
        if re.search(r"(?:url\(|@import)\s*[\"']?https?:", sheet.read_text())
    ]

    assert {page: found for page, found in pages.items() if found} == {}
    assert styles == []


def test_equations_are_drawn_without_a_script(site):
    page = (site / "explanation/clear.html").read_text()

    fences = (ROOT / "docs/explanation/clear.md").read_text().count("```math")

    assert fences > 3
    assert page.count("<math") == fences


def test_what_a_test_or_bench_keeps_is_no_page(site):
    assert not (site / "fidelity").exists()
    assert not (site / "hooks.py").exists()
