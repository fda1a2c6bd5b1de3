"""tools/check_symbols.py finds code that leaks from one instruction set's files into the whole module."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_symbols.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_symbols", TOOL)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_weak_and_global_definitions_are_foreign(tool: ModuleType) -> None:
    output = """
0000000000000000 R harmonium::kOpsAvx512
0000000000000010 t harmonium::(anonymous namespace)::attend(harmonium::AttentionTile const&)
                 U memcpy
0000000000000000 W std::vector<float, std::allocator<float> >::~vector()
0000000000000040 T harmonium::leaked(float)
0000000000000000 V harmonium::kOpsAvx512
0000000000000000 u std::once
"""
    assert tool.foreign_symbols(output) == [
        "W std::vector<float, std::allocator<float> >::~vector()",
        "T harmonium::leaked(float)",
        "V harmonium::kOpsAvx512",
        "u std::once",
    ]


def test_a_directory_without_object_files_is_not_called_clean(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.main([str(tmp_path)]) == 2


def test_this_build_exports_only_tables() -> None:
    build = ROOT / "build" / "dev"
    if not build.is_dir() or shutil.which("nm") is None:
        pytest.skip("needs ./dev-build's object files and nm")
    result = subprocess.run(
        [sys.executable, str(TOOL), str(build)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
