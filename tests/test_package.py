from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import harmonium
from harmonium.testing import make_tiny_checkpoint


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        # The package that runs these tests, and not the source tree in the working folder.
        cwd=tempfile.gettempdir(),
        env={**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).resolve().parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    """What makes `import harmonium` slow is what it drags in, so that is what is counted, not the seconds."""
    loaded = run("import sys, harmonium; print(' '.join(sys.modules))").split()
    heavy = {"numpy", "tiktoken", "rich", "prompt_toolkit", "asyncio", "harmonium._native", "harmonium.llm"}
    assert heavy.isdisjoint(loaded)
    assert [name for name in loaded if name.startswith("harmonium")] == ["harmonium"]


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in harmonium.__all__:
        assert getattr(harmonium, name) is not None
        assert name in dir(harmonium)
    assert harmonium.LLM.__module__ == "harmonium.llm"
    assert harmonium.SamplingParams(temperature=0.5).temperature == 0.5
    assert harmonium.EngineConfig().weights == "int8"
    assert set(harmonium._MODULE_OF) == set(harmonium.__all__) - {"__version__"}


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'harmonium' has no attribute 'nonsense'"):
        _ = harmonium.nonsense


def test_model_answers_where_there_is_no_network(tmp_path: Path) -> None:
    """Nothing but the model's folder: no vocabulary, template or configuration is fetched, then or later."""
    model = make_tiny_checkpoint(tmp_path / "model")
    answer = run(
        "import socket\n"
        "def refused(*_, **__): raise AssertionError('somebody asked for the network')\n"
        "socket.getaddrinfo = socket.create_connection = socket.socket.connect = refused\n"
        "from harmonium import LLM\n"
        f"with LLM({str(model)!r}, context_length=256) as llm:\n"
        "    print(llm.chat('Hi').usage.completion_tokens > 0, llm.decode(llm.encode('Grüße')))"
    )
    assert answer.split() == ["True", "Grüße"]
