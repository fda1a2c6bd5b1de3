"""What docs/install.md promises of the files that it names."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
ENVIRONMENT = (ROOT / "environment.yml").read_text(encoding="utf-8")

NOT_IN_CONDA = {"tiktoken", "llguidance"}
"""Left to pip: they are not on conda-forge in the versions that we need, as far as we know."""


def normalized(name: str) -> str:
    return name.replace("_", "-").lower()


def required() -> dict[str, str]:
    """Package -> version range of the base dependencies."""
    block = PYPROJECT.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    found = re.findall(r'^  "([A-Za-z0-9-]+)([^"]*)"', block, flags=re.M)
    return {normalized(name): versions for name, versions in found}


def from_conda() -> dict[str, str]:
    found = re.findall(r"^  - ([A-Za-z0-9_-]+) (\S+)$", ENVIRONMENT, flags=re.M)
    return {normalized(name): versions for name, versions in found}


def test_the_conda_environment_asks_for_the_versions_of_the_package() -> None:
    wanted, asked = required(), from_conda()
    assert len(wanted) >= 8
    assert {name: asked[name] for name in wanted.keys() - NOT_IN_CONDA} == {
        name: versions for name, versions in wanted.items() if name not in NOT_IN_CONDA
    }
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", PYPROJECT)]
    assert asked["python"] == f">=3.{min(minors)},<3.{max(minors) + 1}"
    assert re.search(r"- pip:\n +- \.\n", ENVIRONMENT), "and Harmonium itself"


@pytest.mark.parametrize("script", ["build_wheels", "check_aarch64"])
def test_scripts_are_there_and_explain_themselves(script: str) -> None:
    path = ROOT / "tools" / script
    assert os.access(path, os.X_OK)
    assert f"tools/{script} " in (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert f"tools/{script} FOLDER" in path.read_text(encoding="utf-8")
