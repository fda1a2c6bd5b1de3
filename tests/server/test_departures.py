"""Clients that leave at random points: nothing of them stays. More: benchmarks/soak.py --disconnects 500."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harmonium.server import create_app
from harmonium.testing import make_tiny_checkpoint

SOURCE = Path(__file__).parents[2] / "benchmarks" / "disconnects.py"


@pytest.fixture(scope="module")
def disconnects() -> ModuleType:
    spec = importlib.util.spec_from_file_location("disconnects", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["disconnects"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_nothing_stays_of_clients_that_leave_a_scripted_engine(disconnects: ModuleType) -> None:
    state = disconnects.scripted_state()
    points, left = disconnects.leave_all(state, create_app(state), 60, seed=1)
    assert left == disconnects.Leftover()
    assert set(points) >= {*disconnects.POINTS, "background cancelled"}


def test_nothing_stays_of_clients_that_leave_the_native_engine(
    disconnects: ModuleType, tmp_path: Path
) -> None:
    state = disconnects.native_state(str(make_tiny_checkpoint(tmp_path / "tiny")))
    try:
        points, left = disconnects.leave_all(state, create_app(state), 60, seed=2)
    finally:
        asyncio.run(state.loaded_engine.close())
    assert left == disconnects.Leftover()
    assert set(points) >= {*disconnects.POINTS, "background cancelled"}
