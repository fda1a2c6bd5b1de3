"""Cross entropy in pieces against PyTorch's, and the loss that balances experts."""

from typing import Any

import pytest

from tests.model.torch_extra import torch

from harmonium.model import torch_loss  # isort: skip
from harmonium.model.torch_loss import cross_entropy, load_balancing_loss  # isort: skip


@pytest.mark.parametrize("at_once", [1, 300, 1 << 25])
def test_pieces_give_the_loss_and_the_gradients_of_the_whole(at_once: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch_loss, "LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    target, counts = torch.randint(0, 77, (41,), generator=generator), torch.rand(41, generator=generator)
    results = []
    for ours in (True, False):
        hidden = torch.randn(41, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weight = torch.randn(77, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        if ours:
            loss = cross_entropy(hidden, weight, target, counts)
        else:
            rows = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="none")
            loss = (rows * counts).sum()
        (loss / 3).backward()
        results.append([loss.detach(), hidden.grad, weight.grad])
    for piecewise, whole in zip(*results, strict=True):
        torch.testing.assert_close(piecewise, whole)


def test_a_frozen_output_matrix_gets_no_gradient() -> None:
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(9, 8)
    cross_entropy(hidden, weight, torch.zeros(5, dtype=torch.int64), torch.ones(5)).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_table_of_all_rows_logits_is_made() -> None:
    hidden, weight = torch.randn(2000, 4, requires_grad=True), torch.randn(50_000, 4)
    made: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Watch():
        cross_entropy(hidden, weight, torch.zeros(2000, dtype=torch.int64), torch.ones(2000)).backward()
    assert 50_000 < max(made) <= torch_loss.LOGITS_AT_ONCE < 2000 * 50_000


def test_balanced_experts_have_the_smallest_loss() -> None:
    even = torch.eye(4).repeat(25, 1) * 0.01
    assert load_balancing_loss([even], 1).item() == pytest.approx(1.0, abs=1e-4)
    lopsided = torch.tensor([[5.0, 0, 0, 0]]).repeat(100, 1)
    assert load_balancing_loss([lopsided], 1).item() > 3
    assert load_balancing_loss([even, lopsided], 1).item() == pytest.approx(
        (load_balancing_loss([even], 1) + load_balancing_loss([lopsided], 1)).item() / 2
    )


@pytest.mark.oracle
@pytest.mark.filterwarnings("default")
def test_one_layers_balancing_loss_is_that_of_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    scores = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    expected = modeling.load_balancing_loss_func((scores,), 8, 2)
    torch.testing.assert_close(load_balancing_loss([scores], 2), expected)
