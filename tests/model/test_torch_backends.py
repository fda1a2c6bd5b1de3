"""Attention by each library, with the sinks it lacks, against the model's reference and a plain formula."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from harmonium.config import EngineConfig
from harmonium.engine.create import create_engine, plan_engine
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.model.attention import AttentionChoice, Case, Device
from harmonium.model.reference import ReferenceModel
from harmonium.model.torch_memory import plan_torch_memory
from tests.model.driver import Driver
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder
from tests.model.torch_extra import torch

from harmonium.model import torch_device, torch_trial  # isort: skip
from harmonium.model.torch import TorchModel  # isort: skip
from harmonium.model.torch_backends import GATHERED, with_sink  # isort: skip
from harmonium.model.torch_runner import TorchRunner  # isort: skip

SIZES = [(1, 1), (1, 40), (5, 40), (40, 40), (33, 129)]


def _inputs(queries: int, keys: int, heads: int = 6, groups: int = 2, size: int = 48) -> list[Any]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    shapes = [(queries, heads, size), (keys, groups, size), (keys, groups, size), (heads,)]
    query, key, value, sink = (torch.randn(*shape, generator=generator) for shape in shapes)
    return [query, key, value, 3 * sink]


def _scores(query: Any, key: Any, window: int, scale: float) -> Any:
    """float64 [H, Q, S], -inf where a query does not see."""
    repeat = query.shape[1] // key.shape[1]
    score = torch.einsum("qhk,shk->hqs", query.double(), key.double().repeat_interleave(repeat, 1)) * scale
    row, column = torch.arange(len(key) - len(query), len(key))[:, None], torch.arange(len(key))
    return score.masked_fill((column > row) | (column <= row - (window or len(key))), float("-inf"))


def _plain(query: Any, key: Any, value: Any, sink: Any, window: int, scale: float) -> Any:
    score = _scores(query, key, window, scale)
    sinks = sink.double()[:, None, None].expand(-1, len(query), 1)
    weight = torch.cat([score, sinks], -1).softmax(-1)[..., :-1]
    repeat = query.shape[1] // key.shape[1]
    return torch.einsum("hqs,shk->qhk", weight, value.double().repeat_interleave(repeat, 1))


def _fake_flash(calls: list[dict[str, Any]]) -> ModuleType:
    """flash_attn_func by the plain formula, with FlashAttention's arguments and results, and no sinks."""

    def flash_attn_func(
        q: Any, k: Any, v: Any, softmax_scale: float, causal: bool, window_size: Any, return_attn_probs: bool
    ) -> Any:
        assert causal and return_attn_probs and q.ndim == k.ndim == v.ndim == 4
        calls.append({"window_size": window_size})
        score = _scores(q[0], k[0], window_size[0] + 1, softmax_scale)
        repeat = q.shape[2] // k.shape[2]
        out = torch.einsum("hqs,shk->qhk", score.softmax(-1), v[0].double().repeat_interleave(repeat, 1))
        return out[None].to(q.dtype), score.logsumexp(-1)[None].float(), None

    module = ModuleType("flash")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    return module


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Both FlashAttention packages, as mocks: neither runs without its card."""
    calls: list[dict[str, Any]] = []
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, _fake_flash(calls))
    return calls


@pytest.mark.parametrize("window", [0, 1, 8, 200])
@pytest.mark.parametrize(("queries", "keys"), SIZES)
@pytest.mark.parametrize("name", GATHERED)
def test_each_counts_the_sink_as_the_plain_formula_does(
    name: str, queries: int, keys: int, window: int, flash_calls: list[dict[str, Any]]
) -> None:
    inputs = _inputs(queries, keys)
    mixed = GATHERED[name](*inputs, window, 0.3)
    torch.testing.assert_close(
        mixed, _plain(*inputs, window, 0.3).float(), rtol=0, atol=3e-6, msg=lambda text: f"{name}: {text}"
    )
    if name.startswith("flash"):
        assert flash_calls == [{"window_size": (window - 1, 0) if window else (-1, -1)}]


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex"])
def test_bf16_is_off_by_its_rounding_and_not_by_the_sink(name: str) -> None:
    inputs = [tensor.bfloat16() for tensor in _inputs(20, 60)]
    mixed, exact = GATHERED[name](*inputs, 8, 0.3), _plain(*inputs, 8, 0.3)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.double(), exact, rtol=2**-6, atol=2**-6)


def test_correction_is_exact_for_any_sink() -> None:
    """A far sink takes all or nothing; none overflows."""
    query, key, value, _ = _inputs(7, 30)
    sink = torch.tensor([-200.0, -3.0, 0.0, 3.0, 30.0, 200.0])
    score = _scores(query, key, 0, 0.3)
    without = torch.einsum("hqs,shk->qhk", score.softmax(-1), value.double().repeat_interleave(3, 1))
    found = with_sink(without.float(), score.logsumexp(-1).float(), sink)
    torch.testing.assert_close(found, _plain(query, key, value, sink, 0, 0.3).float(), rtol=2e-5, atol=1e-6)


@cache
def _reference(model: str) -> Any:
    return ReferenceModel(tiny_checkpoint(model)).logits(prompt(model, 129))


@pytest.mark.parametrize(("model", "chunk"), [("narrow", 32), ("middle", 129), ("wide", 33)])
@pytest.mark.parametrize(
    "name", [name for name in GATHERED if name != "eager"]
)  # eager: test_torch_runner.py
def test_whole_model_gives_the_references_logits(
    name: str, model: str, chunk: int, flash_calls: list[dict[str, Any]]
) -> None:
    tokens, checkpoint = prompt(model, 129), tiny_checkpoint(model)
    runner = TorchRunner(TorchModel.from_checkpoint(checkpoint), attention=name)
    logits_TV = Driver(runner, 8, seed=1).run(tokens, chunk)
    np.testing.assert_allclose(logits_TV, _reference(model), rtol=0, atol=1e-4)
    assert bool(flash_calls) is name.startswith("flash")


def test_engine_runs_what_was_asked_for_and_logs_one_line(
    tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_folder(tmp_path, "narrow")
    with caplog.at_level("INFO", logger="harmonium.engine"):
        engine = create_engine(folder, EngineConfig(engine="torch", device="cpu", attention="sdpa"))
    lines = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert lines == ["attention: sdpa on cpu, float32 (asked for; sinks as one more key without a value)"]
    assert engine is not None


def test_auto_on_this_machine_is_eager_on_the_cpu(tmp_path: Any) -> None:
    plan = plan_engine(tiny_folder(tmp_path, "narrow"), EngineConfig(engine="torch", device="cpu"))
    plan.close()
    assert plan.attention.name == "eager" and plan.attention.device == Device("cpu")


def test_cuda_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"device is 'cuda' and PyTorch .* finds none; expected 'cpu'"):
        torch_device.probe_case("cuda")


def test_probe_finds_a_card_and_the_packages_that_work_on_it(
    monkeypatch: pytest.MonkeyPatch, flash_calls: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Card")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10, 20))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch_device, "find_spec", lambda name: None if name == "triton" else name)
    old = ModuleType("old")
    old.flash_attn_func = lambda q, k, v: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", old)
    case = torch_device.probe_case("auto")
    assert case.device == Device("cuda", (9, 0), "Some Card", 10) and case.dtype == "bfloat16"
    assert case.packages["flash_attn"] == "" and "triton" not in case.packages
    assert case.packages["flash_attn_interface"].startswith("is too old")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert torch_device.probe_case("cuda").packages["flash_attn"].startswith("does not import (")
    assert torch_device.probe_case("cpu").device == Device("cpu")


@pytest.mark.parametrize("name", ["sdpa", "flex", "flash2"])
def test_trial_passes_what_is_right(name: str, flash_calls: list[dict[str, Any]]) -> None:
    assert torch_trial.try_attention(name, Device("cpu"), "float32") is None
    assert torch_trial.try_attention(name, Device("cpu"), "bfloat16") is None


def test_trial_finds_a_forgotten_sink_a_wrong_window_and_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_sink(query: Any, key: Any, value: Any, sink: Any, window: int, scale: float) -> Any:
        return GATHERED["eager"](query, key, value, sink - 100, window, scale)

    def one_too_many(query: Any, key: Any, value: Any, sink: Any, window: int, scale: float) -> Any:
        return GATHERED["eager"](query, key, value, sink, window and window + 1, scale)

    def crash(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available\nfor execution")

    for dtype in ("float32", "bfloat16"):
        for broken, said in (
            (without_sink, "off by"),
            (one_too_many, "off by"),
            (crash, "RuntimeError: no k"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(torch_trial, "GATHERED", {"sdpa": broken})
                assert said in str(torch_trial.try_attention("sdpa", Device("cpu"), dtype))


def test_auto_passes_over_what_fails_its_trial_and_a_forced_one_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(Device("cuda", (9, 0)), "bfloat16", {"triton": "", "flash_attn": "", "torch>=2.9": ""})
    tried: list[str] = []

    def try_attention(name: str, device: Device, dtype: str) -> str | None:
        tried.append(name)
        return "its result was off" if name in ("triton", "flash2") else None

    monkeypatch.setattr(torch_trial, "probe_case", lambda setting: case)
    monkeypatch.setattr(torch_trial, "try_attention", try_attention)
    monkeypatch.setattr(torch_trial, "try_experts", lambda device, dtype: "CompilationError: no")
    choice = torch_trial.choose_for_machine("auto", "auto")
    assert choice.name == "sdpa" and tried == ["triton", "flash2", "sdpa"]
    assert "triton failed its trial on this device: its result was off" in choice.reason
    assert not choice.has_triton_experts
    with pytest.raises(ConfigError, match="attention is 'flash2', which failed its trial on this device"):
        torch_trial.choose_for_machine("flash2", "auto")
    choice = torch_trial.choose_for_machine("eager", "auto")
    assert choice.name == "eager"


def test_experts_that_fail_their_trial_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Device("cuda", (9, 0)), "bfloat16", {"triton": ""})
    monkeypatch.setattr(torch_trial, "probe_case", lambda setting: case)
    monkeypatch.setattr(torch_trial, "try_attention", lambda *_: None)
    for trouble in (None, "its result was off"):
        monkeypatch.setattr(torch_trial, "try_experts", lambda *_, said=trouble: said)
        choice = torch_trial.choose_for_machine("auto", "auto")
        assert choice.name == "triton" and choice.has_triton_experts is (trouble is None)
        assert ("Triton's experts failed their trial" in str(choice)) is (trouble is not None)


def test_card_without_memory_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = TorchRunner(TorchModel.from_checkpoint(tiny_checkpoint("narrow")))

    def new_zeros(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        runner.allocate_cache(4, 4)


def test_a_cards_plan_counts_the_cards_memory() -> None:
    config, engine = CONFIGS["narrow"], EngineConfig(engine="torch", context_length=256)
    card = AttentionChoice("sdpa", Device("cuda", (9, 0), "Some Card", 4 << 30), "bfloat16", "")
    on_card = plan_torch_memory(config, "mxfp4", engine, 1, card)
    assert on_card.limit_bytes == 4 << 30 >= on_card.total_bytes
    older = AttentionChoice("sdpa", Device("cuda", (7, 0), "Old Card", 4 << 30), "float32", "")
    in_float = plan_torch_memory(config, "mxfp4", engine, 1, older)
    assert in_float.window_cache_bytes == 2 * on_card.window_cache_bytes
    assert in_float.expert_bytes == on_card.expert_bytes
    small = AttentionChoice("sdpa", Device("cuda", (9, 0), "Small Card", 1 << 30), "bfloat16", "")
    with pytest.raises(MemoryPlanError, match=r"Small Card has 1\.07 GB"):
        plan_torch_memory(config, "mxfp4", engine, 1 << 40, small)
