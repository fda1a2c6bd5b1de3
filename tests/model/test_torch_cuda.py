"""--engine torch on an NVIDIA GPU: kernels in the released shapes, whole models, the choice of attention.

    TRITON_INTERPRET=0 pytest tests/model/test_torch_cuda.py tests/model/test_torch_triton.py

Skipped elsewhere. What is computed on the card is held against float64 formulas, the model's reference on the
CPU, and Transformers on the same card.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium import LLM, EngineConfig, SamplingParams
from harmonium.config import ATTENTION_NAMES
from harmonium.demo import demo_checkpoint_path
from harmonium.engine.create import create_engine, plan_engine
from harmonium.engine.protocol import Request
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.model.reference import ReferenceModel
from tests.model.driver import Driver
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder
from tests.model.torch_extra import torch
from tests.model.triton_extra import IS_COMPILED

if not IS_COMPILED:
    pytest.skip("Triton is interpreted; TRITON_INTERPRET=0 uses the GPU", allow_module_level=True)

from harmonium.model import torch_trial  # isort: skip
from harmonium.model.torch import TorchModel  # isort: skip
from harmonium.model.torch_backends import GATHERED  # isort: skip
from harmonium.model.torch_device import probe_case  # isort: skip
from harmonium.model.torch_experts import Experts  # isort: skip
from harmonium.model.torch_graphs import CudaRecording  # isort: skip
from harmonium.model.torch_runner import TorchRunner  # isort: skip
from harmonium.model.torch_triton_attention import lay_out, paged_attention  # isort: skip
from harmonium.model.torch_triton_experts import triton_experts  # isort: skip

# PyTorch's compiler, which flex_attention needs, warns of one thing or another.
pytestmark = pytest.mark.filterwarnings("default")

CUDA = torch.device("cuda")
HEADS, GROUPS, SIZE, WINDOW = 64, 8, 64, 128
"""Of the released models."""

CASE = probe_case("cuda")
FLASH = {"flash2": "flash_attn", "flash3": "flash_attn_interface"}
MIXES = {  # (length, new tokens) of each sequence
    "one that decodes, far": [(4097, 1)],
    "many that decode": [(n, 1) for n in (1, 31, 32, 33, 128, 129, 700, 5000)],
    "a prompt": [(512, 512)],
    "a prompt's later piece and others": [(1300, 300), (77, 1), (200, 17)],
}
TOLERANCE = {"float32": 5e-6, "bfloat16": 2**-7}


def _random(seed: int, *shape: int, dtype: Any = None) -> Any:
    tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return tensor.to(CUDA, dtype or torch.float32)


def _plain(query: Any, key: Any, value: Any, sink: Any, window: int, scale: float) -> Any:
    """float64; a sequence's last queries over all its keys."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeat, 1) for x in (key, value))
    score = torch.einsum("qhk,shk->hqs", query.double(), key) * scale
    column = torch.arange(len(key), device=CUDA)
    row = column[len(key) - len(query) :, None]
    hidden = (column > row) | (column <= row - (window or len(key)))
    sinks = sink.double()[:, None, None].expand(-1, len(query), 1)
    weight = torch.cat([score.masked_fill(hidden, float("-inf")), sinks], -1).softmax(-1)[..., :-1]
    return torch.einsum("hqs,shk->qhk", weight, value)


def _close(found: Any, expected: Any, dtype: str) -> None:
    allowed = TOLERANCE[dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("window", [0, WINDOW])
@pytest.mark.parametrize("mix", MIXES)
def test_paged_attention_is_the_plain_formula_in_the_released_shapes(
    mix: str, window: int, dtype: str
) -> None:
    lengths, news = zip(*MIXES[mix], strict=True)
    widths = [-(-length // 32) for length in lengths]
    free = np.random.default_rng(1).permutation(sum(widths) + 3).astype(np.int32)
    table_SB = np.full((len(lengths), max(widths)), -1, np.int32)
    for s, width in enumerate(widths):
        table_SB[s, :width], free = free[:width], free[width:]
    kind = getattr(torch, dtype)
    caches = [_random(seed, sum(widths) + 3, 32, GROUPS, SIZE, dtype=kind) for seed in (1, 2)]
    query, sink = _random(3, sum(news), HEADS, SIZE, dtype=kind), 2 * _random(4, HEADS, dtype=kind)
    start = np.concatenate([[0], np.cumsum(news)]).astype(np.int32)
    position = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, news, strict=True)])
    tiles = lay_out(position.astype(np.int32), start, table_SB, window, HEADS, GROUPS, CUDA)
    found = paged_attention(query, *caches, sink, tiles, SIZE**-0.5)
    for s, length in enumerate(lengths):
        blocks = torch.from_numpy(table_SB[s, : widths[s]]).long().to(CUDA)
        key, value = (cache[blocks].flatten(0, 1)[:length] for cache in caches)
        rows = slice(start[s], start[s + 1])
        _close(found[rows], _plain(query[rows], key, value, sink, window, SIZE**-0.5), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_attention_is_the_plain_formula_in_the_released_shapes(name: str, dtype: str) -> None:
    kind = getattr(torch, dtype)
    if name in FLASH and (dtype == "float32" or CASE.packages.get(FLASH[name]) != ""):
        pytest.skip(f"{name} is not here, or not for {dtype}")
    for queries, keys in ((1, 1), (1, 4097), (300, 1300), (512, 512)):
        inputs = [
            _random(1, queries, HEADS, SIZE, dtype=kind),
            _random(2, keys, GROUPS, SIZE, dtype=kind),
            _random(3, keys, GROUPS, SIZE, dtype=kind),
            2 * _random(4, HEADS, dtype=kind),
        ]
        for window in (0, WINDOW):
            found = GATHERED[name](*inputs, window, SIZE**-0.5)
            _close(found, _plain(*inputs, window, SIZE**-0.5), dtype)


def _experts(dtype: Any) -> Any:
    """One layer's experts of gpt-oss-20b, random."""
    shape = replace(
        CONFIGS["narrow"], hidden_size=2880, expert_size=2880, num_experts=32, num_active_experts=4
    )
    experts = Experts(shape, dtype, packed=True).requires_grad_(False)
    generator = torch.Generator().manual_seed(5)
    for name, buffer in experts.named_buffers():
        low, high = (0, 256) if name.endswith("blocks") else (118, 122)
        buffer.copy_(torch.randint(low, high, buffer.shape, generator=generator))
    for bias in experts.parameters():
        bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    return experts.to(CUDA)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_are_plain_pytorchs_in_the_released_shapes(dtype: str) -> None:
    kind = getattr(torch, dtype)
    experts, exact = _experts(kind), _experts(torch.float32)
    for tokens in (1, 4, 5, 130, 512):
        x = _random(tokens, tokens, 2880, dtype=kind)
        scores = _random(tokens + 1, tokens, 32)
        weight, expert_id = scores.topk(4, dim=-1)
        weight = weight.softmax(-1)
        found = triton_experts(experts, x, expert_id, weight)
        expected = exact(x.float(), expert_id, weight)
        error = (found.float() - expected).norm() / expected.norm()
        assert found.dtype == kind and float(error) < {"float32": 2e-6, "bfloat16": 4e-3}[dtype], error
        again = triton_experts(experts, x, expert_id, weight)
        assert torch.equal(found, again), "the same input, the same bits"


def _model(name: str, dtype: Any = torch.float32) -> Any:
    return TorchModel.from_checkpoint(tiny_checkpoint(name), dtype).requires_grad_(False).to(CUDA)


@pytest.mark.parametrize("name", ["narrow", "tall", "wide"])
@pytest.mark.parametrize("attention", ["triton", "eager", "sdpa", "flex"])
def test_whole_models_give_the_references_logits(attention: str, name: str) -> None:
    """Pieces of prompts and single tokens, blocks in any order, freed window blocks."""
    tokens = prompt(name, 140)
    runner = TorchRunner(_model(name), attention=attention, triton_experts=attention == "triton")
    driver = Driver(runner, 16, seed=1)
    pieces = [driver.feed({"": tokens[i:j]})[""] for i, j in ((0, 100), (100, 137), (137, 138), (138, 140))]
    expected_TV = ReferenceModel(tiny_checkpoint(name)).logits(tokens)
    np.testing.assert_allclose(np.concatenate(pieces), expected_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recorded_decoding_gives_the_logits_of_the_unrecorded(dtype: str) -> None:
    """Sequences that grow past a recording's blocks, join and end; nothing of earlier steps is left."""
    tokens = {name: prompt("wide", length) for name, length in (("a", 300), ("b", 9), ("c", 120))}
    found = []
    for recording in (None, CudaRecording):
        model = _model("wide", getattr(torch, dtype))
        runner = TorchRunner(model, attention="triton", triton_experts=True, recording=recording)
        driver, pieces = Driver(runner, 64, seed=2), []
        driver.feed({name: part[:250] for name, part in tokens.items()})
        for number in range(250, 300):
            names = ("a", "b") if number % 20 < 12 else ("a", "b", "c")
            fed = dict.fromkeys(names, tokens["a"][number : number + 1])
            pieces += driver.feed(fed).values()
        found.append(np.concatenate(pieces))
        if recording is not None:
            assert runner._graphs is not None
            steps = runner._graphs._steps
            assert len(steps) >= 3 and all(step is not None for step in steps.values())
        runner.close()
    np.testing.assert_array_equal(found[0], found[1])


def test_transformers_on_the_same_card_has_the_same_logits() -> None:
    pytest.importorskip("transformers", reason="the extra [oracle] is not installed")
    from tests.model.transformers_oracle import transformers_model

    tokens = prompt("wide", 300)
    oracle = transformers_model(tiny_checkpoint("wide")).to(CUDA)
    with torch.inference_mode():
        theirs = oracle(torch.from_numpy(tokens.astype(np.int64)).to(CUDA)[None], use_cache=False)
    runner = TorchRunner(_model("wide"), attention="triton", triton_experts=True)
    ours = Driver(runner, 16, seed=1).run(tokens, 128)
    np.testing.assert_allclose(ours, theirs.logits[0].float().cpu().numpy(), rtol=0, atol=2e-4)


def test_auto_takes_our_kernels_after_their_trial() -> None:
    choice = torch_trial.choose_for_machine("auto", "auto")
    assert (choice.name, choice.dtype, choice.has_triton_experts) == ("triton", "bfloat16", True)
    assert "failed" not in choice.reason and choice.device.free_bytes > 0
    assert torch_trial.try_attention("triton", choice.device, "float32") is None
    assert torch_trial.try_experts(choice.device, "float32") is None


@pytest.mark.parametrize("name", [name for name in ATTENTION_NAMES if name not in ("auto", "native")])
def test_each_name_runs_or_says_what_is_missing(name: str) -> None:
    try:
        choice = torch_trial.choose_for_machine(name, "cuda")
    except ConfigError as error:
        assert name.startswith("flash") and "which is not installed; expected auto, triton" in str(error)
    else:
        assert choice.name == name


GREEDY = SamplingParams(temperature=0.0, max_tokens=200)
QUESTIONS = (
    "What is 47 + 385?",
    "Reverse the word stone.",
    "What is 6 * 712?",
    "Answer in one word: capital of France?",
)


def _answers(**settings: Any) -> list[str]:
    with LLM(demo_checkpoint_path(), context_length=1024, **settings) as llm:
        results = [llm.chat(question, sampling=GREEDY, current_date="2026-11-25") for question in QUESTIONS]
    return [f"{result.reasoning} / {result.content}" for result in results]


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager", "flex"])
def test_demo_model_answers_as_the_native_engine_does(attention: str) -> None:
    assert _answers(engine="torch", device="cuda", attention=attention) == _answers(threads=2)


async def _tokens(engine: Any, name: str, tokens: Any, count: int) -> list[int]:
    sampling = SamplingParams(temperature=0.0, max_tokens=count, ignore_stop=True)
    request = Request(name, tuple(tokens.tolist()), sampling)
    return [token.token_id async for event in engine.generate(request) for token in event.tokens]


def test_requests_that_share_a_prefix_and_the_card_answer_as_alone(tmp_path: Path) -> None:
    """Cached blocks, prompts in pieces, steps of several sequences, recorded steps."""
    shared = prompt("wide", 200)
    prompts = [np.concatenate([shared, prompt("wide", 10 + n)]).astype(np.int32) for n in range(6)]
    config = EngineConfig(
        engine="torch", device="cuda", context_length=512, max_batch_tokens=64, max_sequences=4
    )

    async def alone() -> list[list[int]]:
        answers = []
        for n, tokens in enumerate(prompts):
            engine = create_engine(folder, config)
            answers.append(await _tokens(engine, f"{n}", tokens, 40))
            await engine.close()
        return answers

    async def together() -> tuple[list[list[int]], int]:
        engine = create_engine(folder, config)
        first = [await _tokens(engine, "0", prompts[0], 40)]
        rest = await asyncio.gather(*(_tokens(engine, f"{n}", prompts[n], 40) for n in range(1, 6)))
        cached = engine.statistics.num_cached_tokens
        await engine.close()
        return [*first, *rest], cached

    folder = tiny_folder(tmp_path, "wide")
    expected = asyncio.run(alone())
    found, cached = asyncio.run(together())
    assert cached >= 5 * 192
    # In bf16 a step with other sequences may round otherwise, and random weights have near ties.
    same = []
    for one, other in zip(expected, found, strict=True):
        pairs = enumerate(zip(one, other, strict=True))
        same.append(next((place for place, (a, b) in pairs if a != b), 40))
    assert same[0] == 40 and sorted(same)[2] >= 5, same


def test_more_than_the_cards_memory_is_refused_with_its_name(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "narrow")
    with pytest.raises(MemoryPlanError, match=f"{torch.cuda.get_device_name()} has"):
        plan_engine(folder, EngineConfig(engine="torch", device="cuda", memory_limit_bytes=64 << 20))


def test_a_card_whose_memory_is_gone_is_a_memory_plan_error(tmp_path: Path) -> None:
    """What was free when it was planned may be another process's by the time it is taken."""
    folder = tiny_folder(tmp_path, "narrow")
    config = EngineConfig(engine="torch", device="cuda", attention="eager", context_length=131_072)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(32e6 / torch.cuda.mem_get_info()[1])
    try:
        with pytest.raises(MemoryPlanError, match="did not give"):
            create_engine(folder, config)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
