"""The router and the experts of a layer, in PyTorch: float experts, or MXFP4 ones as the files hold them.

Tokens are sorted by expert, so that each expert's rows are one product; a Python loop runs over experts,
never over tokens. MXFP4 experts are frozen; each is dequantized when its product is due, forwards and
backwards, and dropped at once.

Dimension letters: T tokens, D model width, E experts, A active experts, F expert width, X rows of one expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.mxfp4 import BLOCK_BYTES, BLOCK_SIZE
from harmonium.model.torch_mxfp4 import dequantize, fake_quantize_mxfp4

PARTS = ("gate_up_proj", "down_proj")
"""The two matrices of an expert, as Hugging Face names them."""


class ExpertAdapter(Protocol):
    """What a LoRA adapter adds to experts (finetune/lora.py has one)."""

    def factors(self, part: str) -> Sequence[tuple[Tensor, Tensor]] | None:
        """(A [r, inputs], B [outputs, r]) of each expert: x @ A.T @ B.T is added to its product.

        None: this part is left alone.
        """
        ...


class Router(nn.Module):
    """Chooses A experts for each token. Scores are computed in float32 whatever the weights are."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_active = config.num_active_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(config.num_experts, dtype=dtype))

    def scores(self, x_TD: Tensor) -> Tensor:
        """float32 [T, E]."""
        return functional.linear(x_TD.float(), self.weight.float(), self.bias.float())

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(all scores [T, E], chosen ids [T, A], their weights [T, A]); of equals the lower id first."""
        return self.choose(self.scores(x_TD))

    def choose(self, score_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` from the scores on."""
        sorted_TE, expert_id_TE = score_TE.sort(dim=-1, descending=True, stable=True)
        weight_TA = sorted_TE[:, : self.num_active].softmax(dim=-1)
        return score_TE, expert_id_TE[:, : self.num_active], weight_TA


class Experts(nn.Module):
    """E experts. Parameter names are Hugging Face's.

    packed: `gate_up_proj_blocks` [E, 2F, D/32, 16], `gate_up_proj_scales` and the same of down_proj are
    buffers, which optimizers and gradients never see. Otherwise `gate_up_proj` [E, D, 2F] and `down_proj`
    [E, F, D] are parameters; with `fakes_mxfp4` set they are used as an export would round them.
    adapter: adds to the products; None: nothing.
    """

    gate_up_proj_bias: nn.Parameter
    down_proj_bias: nn.Parameter

    def __init__(self, config: ModelConfig, dtype: torch.dtype, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.fakes_mxfp4 = False
        self.adapter: ExpertAdapter | None = None
        self.num_experts = E = config.num_experts
        self.limit, self.alpha = config.swiglu_limit, config.swiglu_alpha
        D, F = config.hidden_size, config.expert_size
        for part, outputs, inputs in (("gate_up_proj", 2 * F, D), ("down_proj", D, F)):
            if packed:
                shape = (E, outputs, inputs // BLOCK_SIZE)
                blocks = torch.zeros((*shape, BLOCK_BYTES), dtype=torch.uint8)
                self.register_buffer(f"{part}_blocks", blocks)
                self.register_buffer(f"{part}_scales", torch.zeros(shape, dtype=torch.uint8))
            else:
                weight = nn.Parameter(torch.empty(E, inputs, outputs, dtype=dtype))
                self.register_parameter(part, weight)
            bias = nn.Parameter(torch.empty(E, outputs, dtype=dtype))
            self.register_parameter(f"{part}_bias", bias)

    def forward(self, x_TD: Tensor, expert_id_TA: Tensor, weight_TA: Tensor) -> Tensor:
        """The chosen experts' answers, weighted and summed: [T, D] in x_TD's dtype."""
        order = expert_id_TA.flatten().argsort(stable=True)
        row = order // expert_id_TA.shape[1]
        count_E = torch.bincount(expert_id_TA.flatten(), minlength=self.num_experts).tolist()
        gate_up, down = _Products(self, "gate_up_proj"), _Products(self, "down_proj")
        answers = []
        for expert, x_XD in enumerate(torch.split(x_TD.index_select(0, row), count_E)):
            if len(x_XD):
                unit_XF = swiglu(gate_up(x_XD, expert), self.limit, self.alpha)
                answers.append(down(unit_XF, expert))
        answer = torch.cat(answers) * weight_TA.flatten()[order, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, row, answer)

    def weight_matrix(self, part: str, expert: int) -> Tensor:
        """One expert's matrix [outputs, inputs] in float32, without gradient and without the adapter."""
        if self.packed:
            blocks, scales = self.get_buffer(f"{part}_blocks"), self.get_buffer(f"{part}_scales")
            return dequantize(blocks[expert], scales[expert], torch.float32)
        return self.get_parameter(part)[expert].detach().float().T


class _Products:
    """One of the two matrices of all experts, for one pass: what the experts share is prepared once."""

    def __init__(self, experts: Experts, part: str) -> None:
        # unbind, not [expert]: its backward makes one gradient of all experts instead of one for each.
        self._bias = experts.get_parameter(f"{part}_bias").unbind(0)
        self._packed = experts.packed
        if experts.packed:
            self._blocks = experts.get_buffer(f"{part}_blocks")
            self._scales = experts.get_buffer(f"{part}_scales")
        else:
            weight = experts.get_parameter(part)
            if experts.fakes_mxfp4:
                weight = cast(nn.Parameter, fake_quantize_mxfp4(weight, axis=1))
            self._weight = weight.unbind(0)
        self._factors = experts.adapter.factors(part) if experts.adapter is not None else None

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        if self._packed:
            product = _PackedLinear.apply(  # type: ignore[no-untyped-call]
                x, self._blocks[expert], self._scales[expert]
            )
            out = cast(Tensor, product) + self._bias[expert]
        else:
            out = torch.addmm(self._bias[expert], x, self._weight[expert])
        if self._factors is not None:
            a, b = self._factors[expert]
            out = out + functional.linear(functional.linear(x, a), b)
        return out


class _PackedLinear(torch.autograd.Function):
    """x @ weight.T for a frozen MXFP4 weight; only the packed bytes are kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(blocks, scales)
        return x @ dequantize(blocks, scales, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        blocks, scales = ctx.saved_tensors
        return grads[0] @ dequantize(blocks, scales, grads[0].dtype), None, None


class _SwiGlu(torch.autograd.Function):
    """Keeps its input alone for the backward pass; plain autograd would keep six times as much."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float, alpha: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit, ctx.alpha = limit, alpha
        gate = gate_up[..., 0::2].clamp(max=limit)
        up = gate_up[..., 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(gate * alpha) * (up + 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        raw_gate, raw_up = gate_up[..., 0::2], gate_up[..., 1::2]
        gate, up = raw_gate.clamp(max=ctx.limit), raw_up.clamp(-ctx.limit, ctx.limit)
        sigmoid = torch.sigmoid(gate * ctx.alpha)
        grad_in = torch.empty_like(gate_up)
        slope = sigmoid * (1 + ctx.alpha * gate * (1 - sigmoid))
        # Like autograd's clamp: the gradient passes at the limit itself, and not beyond it.
        grad_in[..., 0::2] = grads[0] * (up + 1) * slope * (raw_gate <= ctx.limit)
        grad_in[..., 1::2] = grads[0] * gate * sigmoid * (raw_up.abs() <= ctx.limit)
        return grad_in, None, None


def swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    """Clamped SwiGLU of [..., 2F] with gate and up alternating: [..., F]."""
    unit: Tensor = _SwiGlu.apply(gate_up, limit, alpha)  # type: ignore[no-untyped-call]
    return unit
