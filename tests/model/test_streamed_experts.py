"""Streamed experts: every number is that of mapped ones, however few are in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.config_json import Layout
from harmonium.config import EngineConfig, Weights
from harmonium.errors import CheckpointError, ConfigError, MemoryPlanError
from harmonium.kernels.matmul import allocate
from harmonium.model.memory import MemoryPlan, plan_memory
from harmonium.model.native import NativeRunner
from harmonium.model.streaming_memory import slot_bytes
from harmonium.testing import tiny_config
from tests.checkpoint.gguf_files import converted, metadata_of, write_gguf
from tests.model.driver import Driver
from tests.model.test_memory import GPT_OSS_20B
from tests.model.tiny_models import CONFIGS, SIZES, tiny_folder

TOKENS = np.random.default_rng(3).integers(0, 200, 40).astype(np.int32)
GB = 10**9
GPT_OSS_120B = tiny_config(
    num_layers=36,
    hidden_size=2880,
    expert_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_size=64,
    num_experts=128,
    num_active_experts=4,
    window=128,
)


def logits(path: Path, weights: Weights, num_slots: int, chunk: int = 16) -> npt.NDArray[np.float32]:
    runner = NativeRunner(open_checkpoint(path), weights, num_expert_slots=num_slots)
    try:
        first = Driver(runner).run(TOKENS, chunk)
        if num_slots:
            counts = runner.expert_counts
            assert counts is not None and counts.misses and counts.bytes_read
        return first
    finally:
        runner.close()


@pytest.mark.parametrize("weights", ["int8", "bf16"])
@pytest.mark.parametrize("name", SIZES)
def test_any_number_of_slots_changes_no_bit(tmp_path: Path, name: str, weights: Weights) -> None:
    path = tiny_folder(tmp_path, name)
    mapped = logits(path, weights, 0)
    for num_slots in (1, 3, 20, 999):
        np.testing.assert_array_equal(logits(path, weights, num_slots), mapped)
    np.testing.assert_array_equal(
        logits(path, weights, 7, chunk=1)[-1], logits(path, weights, 0, chunk=1)[-1]
    )


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_both_layouts_are_streamed(tmp_path: Path, layout: Layout) -> None:
    path = tiny_folder(tmp_path, "middle", layout)
    np.testing.assert_array_equal(logits(path, "int8", 11), logits(path, "int8", 0))


def test_gguf_files_are_streamed(tmp_path: Path) -> None:
    config = CONFIGS["narrow"]
    path = write_gguf(tmp_path / "tiny.gguf", metadata_of(config), converted(config))
    np.testing.assert_array_equal(logits(path, "int8", 9), logits(path, "int8", 0))


def test_many_sequences_in_a_step_change_no_bit(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path, "middle")
    drivers = [Driver(NativeRunner(open_checkpoint(path), num_expert_slots=n)) for n in (0, 6)]
    for step in range(4):
        parts = {name: TOKENS[i + step : i + step + 1 + i] for i, name in enumerate("abcde")}
        mapped, streamed = (driver.feed(parts) for driver in drivers)
        for name in parts:
            np.testing.assert_array_equal(mapped[name], streamed[name])


def test_step_that_cannot_read_an_expert_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = NativeRunner(open_checkpoint(tiny_folder(tmp_path, "middle")), num_expert_slots=6)
    driver = Driver(runner)
    first = driver.feed({"a": TOKENS[:8]})["a"]
    # As if the file had ended: what lies in the map must stay, or the test would end by a signal.
    monkeypatch.setattr("os.preadv", lambda *arguments: 0)
    with pytest.raises(CheckpointError, match="has been shortened"):
        driver.feed({"b": TOKENS[:8]})
    monkeypatch.undo()
    np.testing.assert_array_equal(driver.feed({"c": TOKENS[:8]})["c"], first)
    runner.close()


def test_memory_does_not_grow_past_the_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(size_bytes: int) -> npt.NDArray[np.uint8]:
        sizes.append(size_bytes)
        return allocate(size_bytes)

    monkeypatch.setattr("harmonium.kernels.matmul.allocate", counted)
    runner = NativeRunner(open_checkpoint(tiny_folder(tmp_path, "tall")), num_expert_slots=5)
    assert runner._stream is not None and runner._stream.cache.nbytes == 5 * slot_bytes(runner.config)
    at_start = list(sizes)
    assert at_start.count(runner._stream.cache.nbytes + 4096) == 1
    Driver(runner).run(TOKENS, 16)
    assert sizes == at_start


def plan(limit_bytes: int, config: Any = GPT_OSS_120B, fmt: str = "mxfp4", **settings: Any) -> MemoryPlan:
    settings.setdefault("max_sequences", 1)
    return plan_memory(config, fmt, EngineConfig(**settings), limit_bytes, threads=2)


def test_120b_on_24_gb_keeps_what_fits() -> None:
    chosen = plan(24 * GB)
    assert chosen.streams_experts and not chosen.packs_experts
    assert 22 * GB < chosen.total_bytes <= 24 * GB - 1 * GB
    assert chosen.expert_bytes == chosen.num_expert_slots * slot_bytes(GPT_OSS_120B)
    assert 13_219_000 < slot_bytes(GPT_OSS_120B) < 13_300_000
    assert chosen.context_length == 8192 and chosen.max_batch_tokens == 4096


def test_experts_that_fit_are_not_streamed_unasked() -> None:
    assert not plan(80 * GB).streams_experts and not plan(24 * GB, GPT_OSS_20B).streams_experts
    asked = plan(24 * GB, GPT_OSS_20B, experts="streamed")
    assert asked.num_expert_slots == 24 * 32, "more slots than experts have no use"


def test_expert_memory_is_a_limit() -> None:
    chosen = plan(24 * GB, expert_memory_bytes=5 * GB)
    assert 5 * GB - slot_bytes(GPT_OSS_120B) < chosen.expert_bytes <= 5 * GB
    assert plan(24 * GB, GPT_OSS_20B, expert_memory_bytes=5 * GB).streams_experts, "though all would fit"
    assert not plan(24 * GB, GPT_OSS_20B, expert_memory_bytes=11 * GB).streams_experts
    with pytest.raises(
        ConfigError, match=r"expert_memory_bytes is 1,000; expected at least .* for 8 experts"
    ):
        plan(24 * GB, expert_memory_bytes=1000)
    with pytest.raises(ConfigError, match="expert_memory_bytes is given and experts is 'mapped'"):
        EngineConfig(experts="mapped", expert_memory_bytes=5 * GB)


def test_what_cannot_be_streamed_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="experts is 'streamed' with bf16 experts; expected MXFP4"):
        plan(24 * GB, fmt="bf16", experts="streamed")
    with pytest.raises(MemoryPlanError, match=r"streamed experts need .* and this process may use 2.00 GB"):
        plan(2 * GB, experts="streamed")
    with pytest.raises(MemoryPlanError, match=r"would fit: .*experts streamed from the disk"):
        plan(24 * GB, experts="mapped")


def test_steps_grow_where_memory_allows() -> None:
    assert plan(5 * GB).max_batch_tokens < 4096
    assert plan(24 * GB, max_batch_tokens=8192).max_batch_tokens == 8192
