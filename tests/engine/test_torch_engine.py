"""`--engine torch`: planned, refused where PyTorch is missing, and as greedy as the native engine."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from harmonium.config import EngineConfig, LoraSource
from harmonium.engine import create
from harmonium.engine.create import create_engine, plan_engine
from harmonium.engine.protocol import Request
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.model.batch import SamplingParams
from harmonium.options import engine_config, parse
from tests.model.tiny_models import CONFIGS, prompt, tiny_folder


def _config(**more: Any) -> EngineConfig:
    return EngineConfig(context_length=128, max_batch_tokens=16, max_sequences=2, threads=1, **more)


async def _greedy(folder: Path, config: EngineConfig) -> list[int]:
    engine = create_engine(folder, config)
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_stop=True)
        request = Request("one", tuple(prompt("narrow", 40).tolist()), sampling)
        return [token.token_id async for event in engine.generate(request) for token in event.tokens]
    finally:
        await engine.close()


async def _both(folder: Path) -> tuple[list[int], list[int]]:
    native = await _greedy(folder, _config(weights="bf16"))
    return native, await _greedy(folder, _config(engine="torch"))


def test_torch_and_native_engines_answer_alike(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the extra [torch] is not installed")
    native, torch = asyncio.run(_both(tiny_folder(tmp_path, "narrow")))
    assert len(native) == 12
    assert torch == native


def test_a_missing_pytorch_is_named_with_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"PyTorch is not installed; pip install 'harmonium\[torch\]'"):
        plan_engine(tiny_folder(tmp_path, "narrow"), _config(engine="torch"))


def test_the_plan_counts_float32_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create, "find_spec", lambda name: name)
    folder = tiny_folder(tmp_path, "narrow")
    plans = []
    for engine in ("native", "torch"):
        plan = plan_engine(folder, _config(weights="bf16", engine=engine))
        plan.close()
        plans.append(plan.memory)
    native, torch = plans
    assert torch.dense_bytes == 2 * native.dense_bytes
    assert torch.full_cache_bytes == 2 * native.full_cache_bytes
    assert torch.embedding_bytes == 4 * CONFIGS["narrow"].vocabulary_size * CONFIGS["narrow"].hidden_size
    assert (torch.context_length, torch.packs_experts) == (native.context_length, False)
    with pytest.raises(MemoryPlanError):
        plan_engine(folder, _config(engine="torch", memory_limit_bytes=native.total_bytes + (10 << 20)))


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="engine is 'tpu'; expected 'native' or 'torch'"):
        EngineConfig(engine="tpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="engine is 'torch' and adapters is given"):
        EngineConfig(engine="torch", lora=(LoraSource("cat", tmp_path),))
    with pytest.raises(ConfigError, match="engine is 'torch' and cache_dir is given"):
        EngineConfig(engine="torch", cache_dir=tmp_path)


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_the_option_reaches_the_config(command: str) -> None:
    arguments = parse([command, "x", "--engine", "torch"])
    arguments.max_sequences = 1
    assert engine_config(arguments).engine == "torch"
