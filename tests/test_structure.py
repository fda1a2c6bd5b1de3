"""Rules of docs/architecture.md that import-linter cannot see: extension modules, environment variables."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "harmonium"
SOURCES = sorted(PACKAGE.rglob("*.py"))


@cache
def names_used(path: Path) -> set[str]:
    """Dotted names of a module: what it imports, and every attribute path such as os.environ."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.add(f"{node.value.id}.{node.attr}")
    return names


def modules_using(*wanted: str) -> set[str]:
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if any(name == w or name.startswith(w + ".") for name in names_used(path) for w in wanted)
    }


def test_the_sources_are_found() -> None:
    assert len(SOURCES) > 30


def test_native_code_is_reached_through_kernels_alone() -> None:
    users = modules_using("harmonium._native")
    assert users
    assert all(user.startswith("kernels/") for user in users), users


def test_config_is_the_only_reader_of_environment_variables() -> None:
    assert modules_using("os.environ", "os.getenv", "os.environb") == {"config.py"}


@pytest.mark.parametrize("module", ["torch", "transformers", "jinja2"])
def test_heavy_or_forbidden_libraries_are_not_imported_by_the_core(module: str) -> None:
    allowed = {"finetune", "model/torch.py"} | {
        f"model/{path.name}" for path in PACKAGE.glob("model/torch_*.py")
    }
    users = {user if not user.startswith("finetune/") else "finetune" for user in modules_using(module)}
    assert users <= allowed


def test_no_room_is_called_utils() -> None:
    vague = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    assert not {
        path.relative_to(PACKAGE).as_posix() for path in SOURCES if vague & set(path.with_suffix("").parts)
    }
