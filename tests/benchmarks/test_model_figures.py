"""numerics.py and memory.py on a tiny model: they run, and their figures lie where they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import harmonium
from harmonium.testing import make_tiny_checkpoint

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("models") / "tiny", vocabulary_size=500)


def rows_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(harmonium.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments, "--json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_numerics_compares_int8_bf16_and_float32_at_each_depth(model: Path) -> None:
    rows = rows_of("numerics.py", str(model), "--length", "40", "--layers", "1,2", "--reference", "9")
    assert {row["layers"] for row in rows} == {1, 2}
    errors = {(row["layers"], row["what"]): row["typical error"] for row in rows}
    assert 0.001 < errors[1, "bf16 against float32"] < errors[1, "int8 against float32"] < 0.05
    positions = {row["what"]: row["positions"] for row in rows}
    assert positions["int8 against bf16"] == 40 and positions["int8 against float32"] == 9
    for row in rows:
        assert row["mean divergence"] >= 0 and 0 <= row["same best token"] <= row["best among five"] <= 1


def test_memory_counts_the_plan_and_the_process(model: Path) -> None:
    (figures,) = rows_of("memory.py", str(model), "--tokens", "600")
    parts = sum(
        figures[name]
        for name in figures
        if name.endswith("_bytes") and name.split("_")[0] not in ("limit", "total", "peak", "resident")
    )
    assert parts == figures["total_bytes"]
    assert figures["resident_bytes"] <= figures["peak_bytes"]
    # A tiny model is mostly the process: its estimate must be near enough on its own.
    assert 0.6 < figures["plan_over_peak"] < 1.6
