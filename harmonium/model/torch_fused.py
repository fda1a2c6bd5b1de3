"""The layers with our Triton kernels for all that is no plain product, so with few launches.

The numbers are those of model.torch's modules, whose parameters these are; q, k and v become one matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harmonium.model.torch import TorchModel
from harmonium.model.torch_step import StepInputs

_TRITON = "harmonium.model.torch_triton"
"""Of the modules with our Triton kernels."""


class FusedLayers:
    """A TorchModel with MXFP4 experts over a paged cache. Its projections become parts of one matrix."""

    def __init__(self, model: TorchModel) -> None:
        # Triton is an extra, so its modules are imported where they are asked for.
        self._attention: Any = import_module(f"{_TRITON}_attention")
        self._experts: Any = import_module(f"{_TRITON}_experts")
        self._between: Any = import_module(f"{_TRITON}_layer")
        self._model = model
        self._fused = [_fuse(layer.self_attn) for layer in model.model.layers]

    def compute(self, inputs: StepInputs, caches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits [R, V] in the model's dtype; keys and values are written to the caches, one pair a layer."""
        model, config, eps = self._model, self._model.config, self._model.config.rms_norm_eps
        hidden_TD: Tensor
        add_norm, scale = self._between.add_norm, config.head_size**-0.5
        hidden_TD, added_TXD = model.model.embed_tokens(inputs.token_id_T), None
        layers: Any = model.model.layers
        for index, layer in enumerate(layers):
            kind, attention, mlp = config.layer_kinds[index], layer.self_attn, layer.mlp
            hidden_TD, normed_TD = add_norm(hidden_TD, added_TXD, layer.input_layernorm.weight, eps)
            query_THK = self._between.rotate_and_store(
                functional.linear(normed_TD, *self._fused[index]),
                inputs.cos_TK2,
                inputs.sin_TK2,
                inputs.slots[kind],
                *caches[index],
                config.num_heads,
            )
            mixed_THK = self._attention.paged_attention(
                query_THK, *caches[index], attention.sinks, inputs.tiles[kind], scale
            )
            mixed_T1D = attention.o_proj(mixed_THK.flatten(1))[:, None]
            norm_D = layer.post_attention_layernorm.weight
            hidden_TD, split_TD = add_norm(hidden_TD, mixed_T1D, norm_D, eps, splits=True)
            chosen = self._between.choose_experts(
                split_TD, mlp.router.weight, mlp.router.bias, config.num_active_experts
            )
            added_TXD = self._experts.expert_answers(mlp.experts, split_TD, *chosen)
        _, normed_TD = add_norm(hidden_TD, added_TXD, model.model.norm.weight, eps)
        logits_RV: Tensor = model.lm_head(normed_TD.index_select(0, inputs.row_R))
        return logits_RV


@torch.no_grad()
def _fuse(attention: Any) -> tuple[Tensor, Tensor]:
    """(weight, bias) of q, k and v, one below the other; theirs become parts of it."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight = torch.cat([projection.weight for projection in projections])
    bias = torch.cat([projection.bias for projection in projections])
    start = 0
    for projection in projections:
        stop = start + len(projection.weight)
        projection.weight.data, projection.bias.data = weight[start:stop], bias[start:stop]
        start = stop
    return weight, bias
