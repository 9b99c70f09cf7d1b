"""The import arrows: models <- service <- workers."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MAY_NOT_IMPORT = {
    "models": {"service", "workers", "fastapi", "celery", "sqlalchemy", "zarr", "lancedb"},
    "models/ct": {"torch", "timm"},
    "models/heads/run.py": {"torch", "timm"},
    "models/specs.py": {"torch", "timm"},
    "service": {"workers", "torch"},
    "service/client": {"fastapi", "pydicom", "service.app", "service.routes", "service.settings", "service.storage"},
    "service/storage": {"fastapi", "celery", "service.app", "service.deps", "service.routes"},
    "workers": {"fastapi", "service.app", "service.deps", "service.routes"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("place", MAY_NOT_IMPORT)
def test_imports_point_down(place):
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))

    found = {(path.name, name) for path in files for name in imports(path)}

    assert found
    assert not {
        (path, name) for path, name in found for banned in MAY_NOT_IMPORT[place] if f"{name}.".startswith(f"{banned}.")
    }


def test_our_names_are_ours():
    for name in ("service", "workers", "models"):
        assert Path(importlib.import_module(name).__file__).is_relative_to(ROOT)


@pytest.mark.parametrize("module", ["service.app", "service.cli", "workers.app", "workers.tasks"])
def test_it_starts_without_torch_or_lance(module):
    code = f"import {module}, sys; print(sorted({{'torch', 'lancedb', 'lance'}} & set(sys.modules)))"

    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)

    assert answer.stdout.strip() == "[]"


def test_relative_imports_are_absent():
    for folder in ("service", "workers", "models"):
        for path in (ROOT / folder).rglob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            assert not [node for node in nodes if isinstance(node, ast.ImportFrom) and node.level], path
