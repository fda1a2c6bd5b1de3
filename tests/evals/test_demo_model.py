"""`harmonium eval demo` from one command: the package's own model on its held-out questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harmonium.cli import main

pytestmark = pytest.mark.slow


def test_demo_model_answers_questions_that_it_never_saw(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["eval", "demo", "--limit", "60", "--out", str(out), "--seed", "7"]) == 0
    report = json.loads((out / "report.json").read_text())
    whole = report["efforts"][-1]
    assert (whole["effort"], whole["samples"], whole["errors"]) == ("all", 60, 0)
    assert whole["accuracy"]["value"] >= 0.7, whole["groups"]
    assert len(whole["groups"]) >= 5
    low, high = report["efforts"][0], report["efforts"][2]
    assert high["reasoning_tokens"] > low["reasoning_tokens"]
