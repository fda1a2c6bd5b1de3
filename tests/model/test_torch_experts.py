"""Experts against their formula: gradients, ties, rows of no expert, rounding that is an export's."""

from typing import Any

import numpy as np
import pytest

from harmonium.checkpoint.mxfp4 import decode_mxfp4, quantize_mxfp4
from harmonium.model import reference
from tests.model.tiny_models import CONFIGS
from tests.model.torch_extra import torch

from harmonium.model.torch import TorchModel  # isort: skip
from harmonium.model.torch_experts import Router, swiglu  # isort: skip
from harmonium.model.torch_mxfp4 import dequantize, fake_quantize_mxfp4, round_mxfp4  # isort: skip


def test_swiglu_is_the_references_and_its_gradient_is_autograds() -> None:
    gate_up = torch.randn(50, 32, generator=torch.Generator().manual_seed(0)) * 5
    expected = reference.swiglu(gate_up.numpy(), 7.0, 1.702)
    np.testing.assert_allclose(swiglu(gate_up, 7.0, 1.702).numpy(), expected, rtol=1e-5, atol=1e-5)
    assert torch.autograd.gradcheck(
        lambda x: swiglu(x, 7.0, 1.702), (gate_up.double().requires_grad_(),), atol=1e-6
    )


def test_router_takes_the_lower_id_of_equal_scores() -> None:
    router = Router(CONFIGS["narrow"], torch.float32)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.zero_()
    _, expert_id_TA, weight_TA = router(torch.randn(3, CONFIGS["narrow"].hidden_size))
    assert expert_id_TA.tolist() == [[0, 1]] * 3
    assert torch.equal(weight_TA, torch.full((3, 2), 0.5))


def test_an_expert_that_nobody_chose_has_no_gradient() -> None:
    model = TorchModel.from_config(CONFIGS["narrow"], seed=0)
    experts: Any = model.model.layers[0].mlp.experts  # type: ignore[union-attr]
    x_TD = torch.randn(4, CONFIGS["narrow"].hidden_size)
    experts(x_TD, torch.tensor([[1, 3]] * 4), torch.full((4, 2), 0.5)).sum().backward()
    chosen = experts.gate_up_proj.grad.abs().amax(dim=(1, 2)) > 0
    assert chosen.nonzero().flatten().tolist() == [1, 3]


def _hard_numbers() -> Any:
    """Every order of magnitude, ties between neighbors, blocks of zeros, the largest and smallest floats."""
    rng = np.random.default_rng(0)
    spread = rng.standard_normal((64, 96)) * 10.0 ** rng.integers(-40, 38, (64, 1))
    ties = rng.integers(-28, 29, (64, 96)) / 4 * 2.0 ** rng.integers(-20, 20, (64, 1))
    values = np.concatenate(
        [spread, ties, np.zeros((1, 96)), np.full((1, 96), 3.4e38), np.full((1, 96), 1e-45)]
    )
    return values.astype(np.float32)


def test_rounding_is_that_of_the_export_to_the_bit() -> None:
    values = _hard_numbers()
    with np.errstate(over="ignore"):
        expected = decode_mxfp4(*quantize_mxfp4(values))
    np.testing.assert_array_equal(round_mxfp4(torch.from_numpy(values)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_numbers_are_exact_in_every_dtype(dtype: Any) -> None:
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (64, 3, 16)).astype(np.uint8)
    scales = np.resize(np.arange(3, 252), (64, 3)).astype(np.uint8)
    tensor = dequantize(torch.from_numpy(blocks), torch.from_numpy(scales), dtype)
    np.testing.assert_array_equal(tensor.float().numpy(), decode_mxfp4(blocks, scales))


def test_fake_quantization_lets_the_gradient_through() -> None:
    weight = torch.randn(2, 64, 6, requires_grad=True)
    rounded = fake_quantize_mxfp4(weight, axis=1)
    (rounded * torch.arange(6.0)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(6.0).expand(2, 64, 6))
    blocks = quantize_mxfp4(weight.detach().numpy().swapaxes(1, 2))
    np.testing.assert_array_equal(rounded.detach().numpy().swapaxes(1, 2), decode_mxfp4(*blocks))


def test_a_model_that_fakes_mxfp4_computes_what_its_export_computes() -> None:
    model, ids = TorchModel.from_config(CONFIGS["narrow"], seed=0), torch.arange(30)
    plain_TV = model(ids)
    for layer in model.model.layers:
        layer.mlp.experts.fakes_mxfp4 = True  # type: ignore[union-attr]
    faked_TV = model(ids)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                parameter.copy_(fake_quantize_mxfp4(parameter, axis=1))
    assert (faked_TV - plain_TV).abs().max() > 1e-5
    torch.testing.assert_close(model(ids), faked_TV, rtol=0, atol=1e-6)
