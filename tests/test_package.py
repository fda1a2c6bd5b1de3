from __future__ import annotations

import subprocess
import sys

import pytest

import harmonium


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    """What makes `import harmonium` slow is what it drags in, so that is what is counted, not the seconds."""
    loaded = run("import sys, harmonium; print(' '.join(sys.modules))").split()
    heavy = {"numpy", "tiktoken", "rich", "prompt_toolkit", "asyncio", "harmonium._native", "harmonium.llm"}
    assert heavy.isdisjoint(loaded)
    assert [name for name in loaded if name.startswith("harmonium")] == ["harmonium"]


def test_import_takes_less_than_100_ms() -> None:
    code = "import time; t = time.perf_counter(); import harmonium; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


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
