"""Nothing in the package can run code from a file: no pickle, in whatever disguise."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import harmonium

FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SOURCES = sorted(Path(harmonium.__file__).parent.rglob("*.py"))


def forbidden(source: str) -> list[str]:
    """What a source imports or calls that would load pickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            is_allowing = any(
                word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords
            )
            if name in ("torch.load", "torch.save") or is_allowing:
                found.append(name)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=[path.name for path in SOURCES])
def test_no_module_can_load_a_pickle(path: Path) -> None:
    assert forbidden(path.read_text(encoding="utf-8")) == []


def test_the_search_finds_what_it_is_for() -> None:
    source = (
        "import pickle\nfrom dill import loads\ntorch.load(x)\nnp.load(x, allow_pickle=True)\nnp.load(x)\n"
    )
    assert sorted(forbidden(source)) == ["dill", "np.load", "pickle", "torch.load"]
