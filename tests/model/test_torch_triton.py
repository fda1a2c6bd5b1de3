"""The Triton kernels, in its interpreter or on a GPU: against the format, plain formulas, the reference."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint.mxfp4 import decode_mxfp4
from harmonium.config import EngineConfig
from harmonium.engine.create import create_engine
from harmonium.model.attention import Device
from harmonium.model.reference import ReferenceModel
from tests.model.driver import Driver
from tests.model.tiny_models import CONFIGS, prompt, tiny_checkpoint, tiny_folder
from tests.model.torch_extra import torch
from tests.model.triton_extra import IS_COMPILED, THERE, triton

import triton.language as tl  # isort: skip
from harmonium.model import torch_trial, torch_triton_attention, torch_triton_experts  # isort: skip
from harmonium.model import torch_triton_layer  # isort: skip
from harmonium.model.torch import TorchModel  # isort: skip
from harmonium.model.torch_runner import TorchRunner  # isort: skip
from harmonium.model.torch_triton_attention import lay_out, paged_attention  # isort: skip
from harmonium.model.torch_triton_experts import group_pairs, triton_experts  # isort: skip


@triton.jit  # type: ignore[untyped-decorator]
def _decode(
    blocks, scales, out, rows, num_blocks, ROWS: tl.constexpr, BLOCKS: tl.constexpr, COMPILED: tl.constexpr
):  # type: ignore[no-untyped-def]
    n, b, i = tl.arange(0, ROWS), tl.arange(0, BLOCKS), tl.arange(0, 16)
    low, high, factor = torch_triton_experts._numbers(
        blocks, scales, tl.minimum(n, rows - 1).to(tl.int64), 0, num_blocks, BLOCKS, COMPILED
    )
    at = out + (n[:, None, None] * BLOCKS + b[None, :, None]) * 32 + i[None, None, :] * 2
    tl.store(at, low.to(tl.float32) * factor[:, :, None])
    tl.store(at + 1, high.to(tl.float32) * factor[:, :, None])


@pytest.mark.filterwarnings("ignore:overflow encountered")  # 6 times the largest scale is infinity
def test_every_byte_and_scale_is_the_formats_number_to_the_bit() -> None:
    scale = np.array([0, 1, 2, 3, 126, 127, 128, 200, 253, 254, 255], np.uint8)
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(len(scale), 0)
    scales = scale[:, None].repeat(16, 1)
    out = torch.full((16, 1024), float("nan"), device=THERE)
    held = torch.from_numpy(blocks).to(THERE), torch.from_numpy(scales).to(THERE)
    _decode[(1,)](*held, out, len(scale), 16, ROWS=16, BLOCKS=32, COMPILED=IS_COMPILED)
    out = out[: len(scale)].cpu().numpy()
    with np.errstate(over="ignore"):
        expected = decode_mxfp4(blocks, scales)
    # Interpreted there is no negative zero; nothing that is computed from it differs.
    np.testing.assert_array_equal(out[:, :512] + 0.0, expected + 0.0)
    assert not out[:, 512:].any(), "blocks beyond the last are zero"


def _mlp(name: str, dtype: Any = torch.float32) -> Any:
    model = TorchModel.from_checkpoint(tiny_checkpoint(name), dtype).requires_grad_(False)
    return model.model.layers[0].mlp.to(THERE)


def _random(seed: int, *shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(THERE)


@pytest.mark.parametrize("tokens", [3, 5, 40])
@pytest.mark.parametrize("name", ["narrow", "tall"])
def test_experts_answer_as_plain_pytorch_does(name: str, tokens: int) -> None:
    """Vectors up to 4 tokens, small tiles, large tiles; widths that are no multiple of a program's."""
    mlp = _mlp(name)
    x_TD = _random(tokens, tokens, CONFIGS[name].hidden_size)
    _, expert_id_TA, weight_TA = mlp.router(x_TD)
    found = triton_experts(mlp.experts, x_TD, expert_id_TA, weight_TA)
    torch.testing.assert_close(found, mlp.experts(x_TD, expert_id_TA, weight_TA), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, 20])
def test_bf16_experts_are_off_by_its_rounding(tokens: int) -> None:
    mlp, exact = _mlp("narrow", torch.bfloat16), _mlp("narrow")
    x_TD = _random(7, tokens, 96).bfloat16()
    _, expert_id_TA, weight_TA = mlp.router(x_TD)
    found = triton_experts(mlp.experts, x_TD, expert_id_TA, weight_TA)
    expected = exact.experts(x_TD.float(), expert_id_TA, weight_TA)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6)


def test_nan_in_an_expert_is_not_hidden() -> None:
    mlp = _mlp("narrow")
    experts = mlp.experts
    experts.gate_up_proj_scales = experts.gate_up_proj_scales.clone()
    experts.gate_up_proj_scales[3, 0] = 255
    x_TD, weight_TA = _random(1, 6, 96), torch.full((6, 2), 0.5, device=THERE)
    expert_id_TA = torch.tensor([[0, 1], [3, 2], [0, 2], [1, 3], [4, 0], [1, 2]], device=THERE)
    for rows in (slice(0, 3), slice(0, 6)):
        found = triton_experts(experts, x_TD[rows], expert_id_TA[rows], weight_TA[rows])
        assert found.isnan().any(1).tolist() == (expert_id_TA[rows] == 3).any(1).tolist()


@pytest.mark.parametrize("num_pairs", [1, 16, 33, 200, 256, 1000, 5000])
def test_tiles_hold_every_pair_once_with_its_expert(num_pairs: int) -> None:
    for num_experts, skew in ((5, 1), (32, 1), (32, 6)):
        ids = torch.rand(num_pairs, generator=torch.Generator().manual_seed(num_pairs)) ** skew * num_experts
        expert_id_Y = ids.int().to(THERE)
        tiles = group_pairs(expert_id_Y, num_experts)
        held = []
        for expert, start, stop in zip(tiles.expert_X, tiles.start_X, tiles.stop_X, strict=True):
            end = min(stop, start + tiles.shape.rows)
            pairs = tiles.order_Y[start:end].tolist() if start < stop else []
            assert all(expert_id_Y[pair] == expert for pair in pairs)
            held += pairs
        assert sorted(held) == list(range(num_pairs))


def _cache(lengths: list[int], news: list[int], window: int, shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """(keys, values, block table), with NaN wherever nothing may be read."""
    generator, rng = torch.Generator().manual_seed(sum(lengths)), np.random.default_rng(3)
    key, value = (torch.randn(24, 32, *shape, generator=generator).to(THERE) for _ in range(2))
    free, width = rng.permutation(24).tolist(), max(-(-length // 32) for length in lengths)
    table_SB = np.full((len(lengths), width), -1, np.int32)
    for s, (length, new) in enumerate(zip(lengths, news, strict=True)):
        for b in range(-(-length // 32)):
            table_SB[s, b] = free.pop()
        for cache in (key, value):
            cache[table_SB[s, (length - 1) // 32], (length - 1) % 32 + 1 :] = float("nan")
        for b in range(max(0, length - new - window + 1) // 32 if window else 0):
            key[table_SB[s, b]] = value[table_SB[s, b]] = float("nan")
            table_SB[s, b] = -1
    return key, value, table_SB


def _plain(query: Any, key: Any, value: Any, sink: Any, window: int, scale: float) -> Any:
    """float64; a sequence's last queries over all its keys."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeat, 1) for x in (key, value))
    score = torch.einsum("qhk,shk->hqs", query.double(), key) * scale
    column = torch.arange(len(key), device=key.device)
    row = column[len(key) - len(query) :, None]
    hidden = (column > row) | (column <= row - (window or len(key)))
    sinks = sink.double()[:, None, None].expand(-1, len(query), 1)
    weight = torch.cat([score.masked_fill(hidden, float("-inf")), sinks], -1).softmax(-1)[..., :-1]
    return torch.einsum("hqs,shk->qhk", weight, value.masked_fill(value.isnan(), 0.0))


@pytest.mark.parametrize("shortest_piece", [32, 256])
@pytest.mark.parametrize("window", [0, 8, 40])
@pytest.mark.parametrize("news", [[1, 1, 1], [19, 1, 7]])
def test_paged_attention_is_the_plain_formula(
    news: list[int], window: int, shortest_piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding, and sequences of all kinds in a step; one piece of the context, and several."""
    monkeypatch.setattr(torch_triton_attention, "SHORTEST_PIECE", shortest_piece)
    H, G, K, lengths = 6, 2, 48, [70, 64, 7]
    key, value, table_SB = _cache(lengths, news, window, (G, K))
    position_T = np.concatenate([np.arange(n - m, n) for n, m in zip(lengths, news, strict=True)])
    start_S1 = np.concatenate([[0], np.cumsum(news)]).astype(np.int32)
    query_THK, sink_H = _random(1, len(position_T), H, K), 2 * _random(2, H)
    tiles = lay_out(position_T.astype(np.int32), start_S1, table_SB, window, H, G, THERE)
    assert (tiles.num_pieces > 1) is (shortest_piece == 32)
    mixed_THK = paged_attention(query_THK, key, value, sink_H, tiles, 0.3)
    for s, length in enumerate(lengths):
        rows, blocks = slice(start_S1[s], start_S1[s + 1]), table_SB[s, : -(-length // 32)]
        seen = [cache[blocks].flatten(0, 1)[:length] for cache in (key, value)]
        seen[0] = seen[0].nan_to_num(0.0)
        expected = _plain(query_THK[rows], *seen, sink_H, window, 0.3).float()
        torch.testing.assert_close(mixed_THK[rows], expected, rtol=0, atol=3e-6)


def test_bf16_attention_is_off_by_its_rounding() -> None:
    key, value, table_SB = _cache([40], [20], 8, (2, 16))
    query_THK = _random(1, 20, 6, 16).bfloat16()
    key, value, sink_H = key.bfloat16(), value.bfloat16(), torch.ones(6, device=THERE).bfloat16()
    start_S1, position_T = np.array([0, 20], np.int32), np.arange(20, 40, dtype=np.int32)
    tiles = lay_out(position_T, start_S1, table_SB, 8, 6, 2, THERE)
    mixed_THK = paged_attention(query_THK, key, value, sink_H, tiles, 0.25)
    seen = [cache[table_SB[0]].flatten(0, 1)[:40].nan_to_num(0.0) for cache in (key, value)]
    expected = _plain(query_THK, *seen, sink_H, 8, 0.25)
    assert mixed_THK.dtype == torch.bfloat16
    torch.testing.assert_close(mixed_THK.double(), expected, rtol=2**-6, atol=2**-6)


def test_whole_model_gives_the_references_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long piece, a short one and single tokens: every kernel, through the paged cache."""
    # Fewer programs of the same code, as the interpreter takes its time for each.
    monkeypatch.setattr(torch_triton_experts, "VECTOR_OUTPUTS", 128)
    tokens, checkpoint = prompt("tall", 60), tiny_checkpoint("tall")
    model = TorchModel.from_checkpoint(checkpoint).requires_grad_(False).to(THERE)
    driver = Driver(TorchRunner(model, attention="triton", triton_experts=True), 8, seed=1)
    pieces = [
        driver.feed({"": tokens[start:stop]})[""] for start, stop in ((0, 50), (50, 58), (58, 59), (59, 60))
    ]
    expected_TV = ReferenceModel(checkpoint).logits(tokens)
    np.testing.assert_allclose(np.concatenate(pieces), expected_TV, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_a_sum_is_the_modules(dtype: Any) -> None:
    norm = TorchModel.from_checkpoint(tiny_checkpoint("narrow"), dtype).model.norm.to(THERE)
    hidden_TD, added_TAD = _random(1, 3, 96).to(dtype), _random(2, 3, 2, 96)
    for added in (None, added_TAD[:, :1].to(dtype), added_TAD):
        expected_TD = hidden_TD if added is None else hidden_TD + added.sum(1).to(dtype)
        for splits in (False, True):
            found = torch_triton_layer.add_norm(hidden_TD, added, norm.weight, norm.eps, splits)
            normed_TD = norm(expected_TD)
            wanted = torch_triton_experts.split_blocks(normed_TD) if splits else normed_TD
            # Triton's interpreter rounds to bf16 in its own way.
            loose = 2**-7 if dtype != torch.float32 else 1e-5
            torch.testing.assert_close(found[0], expected_TD, rtol=loose, atol=10 * loose)
            torch.testing.assert_close(found[1], wanted, rtol=2 * loose, atol=10 * loose)


def test_experts_are_chosen_as_the_router_does_ties_and_nan_included() -> None:
    router = _mlp("tall").router.requires_grad_(False)
    router.bias.zero_()
    router.weight[5], router.weight[2] = router.weight[9], router.weight[0]  # equal scores
    x_TD = _random(4, 7, 128)
    x_TD[6, 3] = float("nan")
    split_TD = torch_triton_experts.split_blocks(x_TD)
    found_id, found = torch_triton_layer.choose_experts(split_TD, router.weight, router.bias, 3)
    _, expected_id, expected = router(x_TD)
    for ours, theirs in zip(found_id[:6].tolist(), expected_id[:6].tolist(), strict=True):
        assert sorted(ours) == sorted(theirs)  # a library may round equal rows apart
        for low, high in ((5, 9), (0, 2)):
            assert not {low, high} <= set(ours) or ours.index(high) == ours.index(low) + 1
    torch.testing.assert_close(found[:6], expected[:6], rtol=1e-5, atol=1e-6)
    assert found[6].isnan().all() and expected[6].isnan().all() and int(found_id.max()) < 11


def test_trial_passes_both_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_triton_experts, "VECTOR_OUTPUTS", 128)
    there = Device("cuda" if IS_COMPILED else "cpu")
    assert torch_trial.try_experts(there, "bfloat16") is None
    assert torch_trial.try_attention("triton", there, "bfloat16") is None


@pytest.mark.skipif(IS_COMPILED, reason="on a CPU Triton is its interpreter")
def test_engine_says_that_triton_computes(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_folder(tmp_path, "narrow")
    with caplog.at_level("INFO", logger="harmonium.engine"):
        create_engine(folder, EngineConfig(engine="torch", device="cpu", attention="triton"))
    lines = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert lines == [
        "attention: triton on cpu, float32 (asked for; sinks in the kernel; MXFP4 experts by Triton)"
    ]


def test_kernels_compile_for_a_card_without_having_it(tmp_path: Path) -> None:
    """For Hopper, as far as its machine code; tools/compile_triton.py does it for the others too."""
    tool = Path(__file__).parents[2] / "tools" / "compile_triton.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-P", str(tool), "90"], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [line.split() for line in run.stdout.splitlines()[1:]]
    assert len(rows) == 15 and {row[0] for row in rows} == {
        "_attend_piece",
        "_join_pieces",
        "_add_norm",
        "_rotate_and_store",
        "_choose_experts",
        "_group_pairs",
        "_multiply_vectors",
        "_multiply_tiles",
    }
