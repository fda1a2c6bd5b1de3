"""Transformers, an independent implementation, loads the shipped model and writes the same answers."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from demo.compare import compared
from harmonium.demo import demo_checkpoint_path


@pytest.mark.oracle
@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers() -> None:
    """The exact path, so that no rounding of weights to int8 decides a near tie."""
    same, different = compared(demo_checkpoint_path(), num_prompts=20, weights="bf16")
    assert len(same) >= 19, different
