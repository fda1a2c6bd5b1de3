"""Tiled attention against the plain formula, and what it keeps in memory."""

from typing import Any

import pytest

from tests.model.torch_extra import torch

from harmonium.model import torch_attention  # isort: skip
from harmonium.model.torch_attention import sink_attention  # isort: skip


def _inputs(tokens: int, heads: int = 6, groups: int = 2, size: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, size), (tokens, groups, size), (tokens, groups, size), (heads,)]
    return [torch.randn(*shape, generator=generator, requires_grad=True) for shape in shapes]


def _plain(query: Any, key: Any, value: Any, sink: Any, first: Any, last: Any, scale: float) -> Any:
    repeat = query.shape[1] // key.shape[1]
    score = torch.einsum("qhk,shk->hqs", query, key.repeat_interleave(repeat, 1)) * scale
    row = torch.arange(len(key))
    hidden = (row < first[:, None]) | (row > last[:, None])
    score = torch.cat(
        [score.masked_fill(hidden, float("-inf")), sink[:, None, None].expand(-1, len(query), 1)], -1
    )
    return torch.einsum("hqs,shk->qhk", score.softmax(-1)[..., :-1], value.repeat_interleave(repeat, 1))


def _bounds(tokens: int, window: int, starts: tuple[int, ...]) -> tuple[Any, Any]:
    row = torch.arange(tokens)
    start = torch.tensor(starts)[torch.bucketize(row, torch.tensor(starts), right=True) - 1]
    return torch.maximum(start, row - window + 1), row


@pytest.mark.parametrize("tile_scores", [1, 1 << 12, 1 << 22])
@pytest.mark.parametrize(
    ("window", "starts"), [(300, (0,)), (9, (0,)), (300, (0, 17, 18, 150)), (9, (0, 100))]
)
def test_tiles_give_the_plain_formula_and_its_gradients(
    window: int, starts: tuple[int, ...], tile_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_attention, "TILE_SCORES", tile_scores)
    bounds, pull = _bounds(300, window, starts), torch.randn(300, 6, 8)
    results = []
    for function in (sink_attention, _plain):
        inputs = _inputs(300)
        out = function(*inputs, *bounds, 0.3)
        (out * pull).sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=2e-5)


def test_queries_may_be_the_last_rows_of_longer_keys() -> None:
    query, key, value, sink = _inputs(50)
    first, last = _bounds(50, 20, (0,))
    whole = sink_attention(query, key, value, sink, first, last, 0.3)
    part = sink_attention(query[37:], key[10:], value[10:], sink, first[37:] - 10, last[37:] - 10, 0.3)
    torch.testing.assert_close(part, whole[37:], rtol=0, atol=1e-6)


def test_far_scores_and_far_sinks_do_not_overflow() -> None:
    query, key, value, sink = _inputs(20)
    first, last = _bounds(20, 20, (0,))
    out = sink_attention(
        query * 100, key * 100, value, sink + torch.tensor([200.0, -200, 0, 0, 0, 0]), first, last, 1
    )
    out.sum().backward()
    assert out.isfinite().all()
    assert all(tensor.grad.isfinite().all() for tensor in (query, key, value, sink))


class _Counter(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
    """Remembers the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("window", [128, 8192])
def test_no_tensor_grows_with_the_square_of_8192_tokens(window: int) -> None:
    inputs = _inputs(8192, heads=2, groups=1)
    with _Counter() as counter:
        sink_attention(*inputs, *_bounds(8192, window, (0,)), 0.3).sum().backward()
    bound = torch_attention.MAX_TILE * 2 * (window + torch_attention.MAX_TILE) if window < 8192 else 1 << 22
    assert 8192 * 2 * 8 <= counter.largest <= bound, f"{counter.largest:,} numbers; plain: {2 * 8192**2:,}"


def test_a_window_layers_work_is_linear_in_the_tokens() -> None:
    for tokens in (1024, 4096):
        tiles = torch_attention._tiles(*_bounds(tokens, 128, (0,)), num_heads=8)
        assert sum(hidden.numel() for _, _, hidden in tiles) <= tokens * (128 + torch_attention.MAX_TILE)
