"""What the documents say: their Python runs, their commands parse, their table of rooms is whole."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from harmonium.options import parse
from harmonium.testing import make_tiny_checkpoint

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("docs") / "tiny")


def run(code: str, tiny: Path) -> dict[str, Any]:
    """Run an example on a small model, whose answers a short context ends soon."""
    code = re.sub(r'"PATH"|"gpt-oss-20b"', repr(str(tiny)), code)
    code = code.replace("context_length=16384", "context_length=256")
    code = code.replace(f"LLM({str(tiny)!r})", f"LLM({str(tiny)!r}, context_length=256)")
    names: dict[str, Any] = {}
    exec(compile(code, "example", "exec", dont_inherit=True), names)
    return names


def test_example_of_the_readme_runs(tiny: Path) -> None:
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "import LLM" in block]
    names = run(code, tiny)
    assert names["logits"].shape == (2, 201_088)


def test_example_of_the_python_api_runs(tiny: Path) -> None:
    (code,) = [block for block in blocks(ROOT / "docs/api.md", "python") if "import LLM" in block]
    names = run(code, tiny)
    assert names["result"].usage.completion_tokens > 0


def test_example_of_the_engine_runs(tiny: Path) -> None:
    code = blocks(ROOT / "docs/engine.md", "python")[0]
    names = run(code, tiny)
    try:
        assert len(asyncio.run(names["answer"](names["engine"], (1, 2, 3)))) > 0
    finally:
        asyncio.run(names["engine"].close())


COMMAND = re.compile(r"(?:^|\| |&& |/)(harmonium (?:inspect|chat|generate|bench|serve|finetune)\b[^|>&#]*)")


def commands() -> list[str]:
    """What the pages' blocks call `harmonium` with; the prose of a table stands behind three blanks."""
    found = []
    for page in PAGES:
        for block in blocks(page, "(?:sh|bash|)"):
            for line in block.replace("\\\n", " ").splitlines():
                match = COMMAND.search(line)
                if match and "..." not in line and "[" not in match[1]:
                    command = re.sub(r"^(harmonium \w+) +", r"\1 ", match[1])
                    found.append(re.split(r" {3,}", command)[0].strip())
    return found


@pytest.mark.parametrize("command", commands())
def test_command_of_the_documents_is_one_that_we_have(command: str) -> None:
    words = shlex.split(command)
    assert parse(words[1:]).command == words[1]


def test_commands_are_found() -> None:
    assert len(commands()) > 8


def test_architecture_page_names_every_room() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    package = ROOT / "harmonium"
    rooms = [path.name for path in package.glob("*.py") if not path.name.startswith("_")]
    rooms += [f"{path.name}/" for path in package.iterdir() if (path / "__init__.py").is_file()]
    assert len(rooms) > 20
    assert [room for room in sorted(rooms) if f"`{room}`" not in page] == []
