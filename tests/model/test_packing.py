"""Experts are packed while steps run; numbers stay, and the files' pages go."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.config import EngineConfig
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.model import weights
from harmonium.model.memory import PACKING_SPARE_BYTES, packing_bytes, plan_memory
from harmonium.model.native import NativeRunner
from harmonium.testing import make_tiny_checkpoint
from tests.model.driver import Driver
from tests.model.test_memory import GPT_OSS_20B
from tests.model.test_pages import resident_bytes
from tests.model.tiny_models import tiny_checkpoint

TOKENS = np.random.default_rng(3).integers(0, 300, 40).astype(np.int32)


def test_packed_experts_change_no_bit() -> None:
    mapped = Driver(NativeRunner(tiny_checkpoint("narrow"))).run(TOKENS, 16)
    runner = NativeRunner(tiny_checkpoint("narrow"), packs_experts=True)
    runner.wait_until_resident()
    assert runner._weights is not None and all(layer.experts._packed for layer in runner._weights.layers)
    np.testing.assert_array_equal(Driver(runner).run(TOKENS, 16), mapped)


def test_steps_use_the_files_until_a_layer_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on = threading.Event()
    real = weights.pack_mxfp4
    monkeypatch.setattr(weights, "pack_mxfp4", lambda *arrays: may_go_on.wait(30) and real(*arrays))
    runner = NativeRunner(tiny_checkpoint("narrow"), packs_experts=True)
    before = Driver(runner).run(TOKENS, 16)
    assert runner._weights is not None and not runner._weights.layers[0].experts._packed
    may_go_on.set()
    runner.wait_until_resident()
    mapped = Driver(NativeRunner(tiny_checkpoint("narrow"))).run(TOKENS, 16)
    np.testing.assert_array_equal(before, mapped)


def test_expert_that_is_packed_leaves_the_files_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny_checkpoint(
        tmp_path / "m", vocabulary_size=500, hidden_size=256, num_layers=2, expert_size=1024, num_experts=16
    )
    checkpoint = open_checkpoint(folder)
    (file,) = {info.file for info in checkpoint.tensors.values()}
    mapped = Driver(NativeRunner(open_checkpoint(folder), "int8")).run(TOKENS, 16)
    resident: list[int] = []
    real = weights.pack_mxfp4

    def packing(*arrays: Any) -> None:
        real(*arrays)
        resident.append(resident_bytes(file))

    monkeypatch.setattr(weights, "pack_mxfp4", packing)
    runner = NativeRunner(checkpoint, "int8", packs_experts=True)
    runner.wait_until_resident()
    # The system may map 2 MB around a page; a layer's experts would be 7 MB, and both layers' 13.
    layer = sum(info.nbytes for name, info in checkpoint.tensors.items() if "layers.0.experts" in name)
    assert layer > 6 << 20 and max(resident) - resident[0] < layer / 2
    np.testing.assert_array_equal(Driver(runner).run(TOKENS, 16), mapped)
    runner.close()


def test_experts_stay_mapped_when_memory_is_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size_bytes: int) -> None:
        raise MemoryError

    monkeypatch.setattr(weights, "allocate", refuse)
    runner = NativeRunner(tiny_checkpoint("narrow"), packs_experts=True)
    runner.wait_until_resident()
    assert runner._weights is not None and not any(layer.experts._packed for layer in runner._weights.layers)
    assert np.isfinite(Driver(runner).run(TOKENS, 16)).all()


def test_closing_does_not_wait_for_packing() -> None:
    runner = NativeRunner(tiny_checkpoint("narrow"), packs_experts=True)
    runner.close()
    assert not runner._reader._thread.is_alive()


def test_experts_are_packed_only_where_memory_is_left_over() -> None:
    def plan(experts: str, limit: int, fmt: str = "mxfp4", **fields: object) -> bool:
        config = replace(EngineConfig(context_length=8192, max_sequences=1), experts=experts, **fields)  # type: ignore[arg-type]
        return plan_memory(GPT_OSS_20B, fmt, config, limit).packs_experts

    one = plan_memory(
        GPT_OSS_20B, "mxfp4", EngineConfig(context_length=8192, max_sequences=1, experts="mapped"), 1 << 40
    )
    needed = one.total_bytes + packing_bytes(GPT_OSS_20B)
    assert plan("auto", needed + PACKING_SPARE_BYTES)
    assert not plan("auto", needed + PACKING_SPARE_BYTES - 1)
    assert plan("packed", needed) and not plan("mapped", 1 << 40)
    assert not plan("auto", 1 << 40, "bf16") and not plan("auto", 1 << 40, weights="bf16")
    with pytest.raises(MemoryPlanError, match=r"packed experts need .* experts 'mapped' need"):
        plan("packed", needed - 1)
    with pytest.raises(ConfigError, match="experts is 'packed' with bf16 experts"):
        plan("packed", 1 << 40, "bf16")


def test_unknown_placing_is_named() -> None:
    with pytest.raises(ConfigError, match="experts is 'pinned'; expected 'auto', 'mapped', 'packed' or"):
        EngineConfig(experts="pinned")  # type: ignore[arg-type]
