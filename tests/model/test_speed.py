"""What `inspect` says to expect: the disk counts where experts are streamed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from harmonium.checkpoint import open_checkpoint
from harmonium.checkpoint.expert_pieces import expert_pieces
from harmonium.config import EngineConfig
from harmonium.engine.create import plan_engine
from harmonium.errors import CheckpointError
from harmonium.model.disk_rate import measure_disk_rate
from harmonium.model.memory import expert_bytes
from harmonium.model.speed import SpeedLimit, StreamedSpeed, measure_speed_limit
from tests.model.tiny_models import tiny_folder


def test_streamed_experts_add_the_disks_time(tmp_path: Path) -> None:
    config = EngineConfig(context_length=64, threads=1, experts="streamed", expert_memory_bytes=400_000)
    plan = plan_engine(tiny_folder(tmp_path, "middle"), config)
    model = plan.checkpoint.config
    speed = measure_speed_limit(plan.checkpoint, plan.resolved.config, plan.memory)
    plan.close()
    streamed = speed.streamed
    assert streamed is not None and streamed.disk_bytes_per_second > 0
    num_experts = model.num_layers * model.num_experts
    assert 0 < plan.memory.num_expert_slots < num_experts
    assert streamed.in_memory == plan.memory.num_expert_slots / num_experts
    missing = (1 - streamed.in_memory) * expert_bytes(model, "mxfp4")
    assert streamed.disk_bytes_per_chunk == pytest.approx(missing)
    assert streamed.disk_bytes_per_token == pytest.approx(missing * 4 / 9)
    assert "from the disk, which gave" in speed.text() and "for each 4,096" in speed.text()


def test_expected_speed_is_that_of_both_one_after_the_other() -> None:
    streamed = StreamedSpeed(0.5, 1e9, 2e9, 4096, 30e9)
    speed = SpeedLimit(2e9, 20e9, streamed)
    assert speed.decode_tokens_per_second_at_most == pytest.approx(1 / (0.1 + 0.5))
    alone = replace(speed, streamed=None)
    assert alone.decode_tokens_per_second_at_most == pytest.approx(10.0)
    assert "at most 10 tokens a second" in alone.text()
    assert "50% of them are in memory" in speed.text() and "(15 s) for each 4,096 tokens" in speed.text()


def test_disk_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_folder(tmp_path, "narrow"))
    layers = [expert_pieces(checkpoint, layer) for layer in range(checkpoint.config.num_layers)]
    assert measure_disk_rate(layers, checkpoint.config.num_experts, 0.02) > 0
    monkeypatch.setattr("os.preadv", lambda *arguments: 0)
    with pytest.raises(CheckpointError, match="has been shortened"):
        measure_disk_rate(layers, checkpoint.config.num_experts, 0.02)
