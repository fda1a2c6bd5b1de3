"""gpt-oss for training a small model whole on a processor: bf16 products, padded rows, a compact vocabulary.

The weights are a `TorchModel`'s, with a row of the vocabulary for each token that occurs in the data and one
for all others; the arithmetic is that of `harmonium.model.torch` in another form. Processors with AVX-512
bf16 multiply five times faster in bf16 than PyTorch does in float32; that, products over whole rows, and
openings that are computed once for several conversations make training possible that would take days.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonium.checkpoint.model_config import LayerKind, ModelConfig
from harmonium.errors import ConfigError
from harmonium.finetune.rows import RowBatch
from harmonium.model.torch import Layer, TorchModel
from harmonium.model.torch_mxfp4 import fake_quantize_mxfp4

EMBEDDING_DEVIATION, HEAD_DEVIATION = 0.5, 0.03
ROUTER_DEVIATION = 0.02
OUTPUT_GAIN, DOWN_GAIN = 0.5, 0.3
"""Of the matrices that write to the hidden states: they begin quieter than the others."""
LOGIT_SIZE_WEIGHT = 1e-3
"""Of the router's squared log-sum-exp, which keeps its scores small. Source: ST-MoE, arXiv 2202.08906."""
SHIFTED_SCORE_LIMIT = 60.0
"""exp() of it is far from overflow; scores of a trained model stay below."""
_BF16 = torch.bfloat16


def row_masks(position_BT: Tensor, segment_BT: Tensor, window: int) -> dict[LayerKind, Tensor]:
    """Additive masks [B, 1, T, T] by kind of layer: the opening (segment 0) and one's own segment."""
    step = torch.arange(position_BT.shape[1])
    causal = step[None, :, None] >= step[None, None, :]
    full = causal & ((segment_BT[:, :, None] == segment_BT[:, None, :]) | (segment_BT[:, None, :] == 0))
    near = full & (position_BT[:, :, None] - position_BT[:, None, :] < window)
    zero, never = torch.zeros(1, dtype=_BF16), torch.full((1,), -1e30, dtype=_BF16)
    return {
        "window": torch.where(near, zero, never).unsqueeze(1),
        "full": torch.where(full, zero, never).unsqueeze(1),
    }


# The functions below are compiled: each becomes one or two loops over memory.


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight.to(_BF16), bias.to(_BF16))


def _heads(
    x: Tensor, norm: Tensor, eps: float, weights: list[Tensor], cosine: Tensor, sine: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (scaled), keys and values, each [B, H, T, K] in bf16."""
    B, T, _ = x.shape
    query, query_bias, key, key_bias, value, value_bias = weights
    H, G = query.shape[0] // size, key.shape[0] // size
    h = _norm(x, norm, eps).to(_BF16)

    def rotated(y: Tensor) -> Tensor:
        first, second = y.float().chunk(2, -1)
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)

    def repeated(y: Tensor) -> Tensor:
        return y.unsqueeze(2).expand(B, G, H // G, T, size).reshape(B, H, T, size).contiguous()

    q = (rotated(_linear(h, query, query_bias).view(B, T, H, size)) * size**-0.5).to(_BF16)
    k = rotated(_linear(h, key, key_bias).view(B, T, G, size)).to(_BF16)
    v = _linear(h, value, value_bias).view(B, T, G, size)
    return q.transpose(1, 2).contiguous(), repeated(k.transpose(1, 2)), repeated(v.transpose(1, 2))


def _weigh(scores: Tensor, mask: Tensor, sink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores), 1 / their sum with the sink, and the sink's share."""
    e = torch.exp((scores.float() + mask.float()).clamp(max=SHIFTED_SCORE_LIMIT)).to(_BF16)
    at_sink = torch.exp(sink.view(1, -1, 1))
    total = e.float().sum(-1) + at_sink
    return e, 1 / total, at_sink / total


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale.unsqueeze(-1)).to(_BF16)


def _weigh_backward(
    e: Tensor, scale: Tensor, d_weight: Tensor, d_out: Tensor, out: Tensor, sink_share: Tensor
) -> tuple[Tensor, Tensor]:
    mean = (d_out.float() * out.float()).sum(-1)
    d_scores = (e.float() * (scale.unsqueeze(-1) * (d_weight.float() - mean.unsqueeze(-1)))).to(_BF16)
    return d_scores, -(sink_share * mean).sum((0, 2))


def _after_attention(
    x: Tensor,
    heads: Tensor,
    out: Tensor,
    out_bias: Tensor,
    norm: Tensor,
    eps: float,
    router: Tensor,
    router_bias: Tensor,
    A: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The residual, the experts' input, chosen experts, their weights, and the loss of an uneven choice."""
    B, T, D = x.shape
    x = x + _linear(heads.transpose(1, 2).reshape(B, T, -1), out, out_bias).float()
    h = _norm(x, norm, eps).view(B * T, D)
    logits = functional.linear(h, router, router_bias)
    top, chosen = logits.topk(A, -1)
    E = router.shape[0]
    share = functional.one_hot(chosen, E).float().sum(1).mean(0) / A
    balance = (logits.softmax(-1).mean(0) * share).sum() * E
    balance = balance + LOGIT_SIZE_WEIGHT * logits.logsumexp(-1).square().mean()
    return x, h.to(_BF16), chosen, top.softmax(-1), balance


def _swiglu(gate_up: Tensor, limit: float, alpha: float) -> Tensor:
    y = gate_up.float()
    gate, up = y[..., 0::2].clamp(max=limit), y[..., 1::2].clamp(-limit, limit)
    return ((up + 1) * gate * torch.sigmoid(gate * alpha)).to(_BF16)


def _answer_loss(
    x: Tensor, norm: Tensor, eps: float, head: Tensor, target: Tensor, extra: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and rightness of each row. extra: the shared class stands for many tokens with the same logit."""
    logits = functional.linear(_norm(x, norm, eps).to(_BF16), head.to(_BF16)).float() + extra
    return functional.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target


class _Attention(torch.autograd.Function):
    """Attention with sinks. The maximum is not subtracted: scores are clamped instead, which saves a pass."""

    weigh: Callable[..., Any] = staticmethod(_weigh)
    scaled: Callable[..., Any] = staticmethod(_scaled)
    weigh_backward: Callable[..., Any] = staticmethod(_weigh_backward)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor) -> Tensor:
        B, H, T, K = q.shape
        scores = torch.bmm(q.view(B * H, T, K), k.view(B * H, T, K).transpose(1, 2)).view(B, H, T, T)
        e, scale, sink_share = _Attention.weigh(scores, mask, sink)
        plain = torch.bmm(e.view(B * H, T, T), v.view(B * H, T, K)).view(B, H, T, K)
        out: Tensor = _Attention.scaled(plain, scale)
        ctx.save_for_backward(q, k, v, e, scale, sink_share, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, e, scale, sink_share, out = ctx.saved_tensors
        B, H, T, K = q.shape
        d_out = d_out.contiguous()

        def flat(y: Tensor) -> Tensor:
            return y.view(B * H, T, -1)

        d_weight = torch.bmm(flat(d_out), flat(v).transpose(1, 2)).view(B, H, T, T)
        d_v = torch.bmm(flat(e).transpose(1, 2), flat(_Attention.scaled(d_out, scale))).view(B, H, T, K)
        d_scores, d_sink = _Attention.weigh_backward(e, scale, d_weight, d_out, out, sink_share)
        d_q = torch.bmm(flat(d_scores), flat(k)).view(B, H, T, K)
        d_k = torch.bmm(flat(d_scores).transpose(1, 2), flat(q)).view(B, H, T, K)
        return d_q, d_k, d_v, d_sink, None


class CompactModel(nn.Module):
    """A model in training. weights: a `TorchModel` whose vocabulary is the shared row, then `used`'s rows.

    config: of the whole model. used: token ids, ascending. Experts with `fakes_mxfp4` set are computed with
    as MXFP4 will hold them.
    """

    def __init__(self, config: ModelConfig, used: Sequence[int], seed: int) -> None:
        super().__init__()
        if list(used) != sorted(set(used)) or not used or used[-1] >= config.vocabulary_size or used[0] < 0:
            raise ConfigError(
                f"the used tokens are {len(used):,}, {used[0] if used else None} first; expected some, "
                f"ascending, below {config.vocabulary_size:,}"
            )
        self.config, self.used = config, list(used)
        compact = replace(config, vocabulary_size=len(used) + 1)
        self.weights = TorchModel.from_config(compact, seed)
        self._initialize(torch.Generator().manual_seed(seed))
        row_of = np.zeros(config.vocabulary_size, np.int64)
        row_of[self.used] = np.arange(1, len(used) + 1)
        self._row_of = row_of
        extra = torch.zeros(len(used) + 1)
        extra[0] = math.log(config.vocabulary_size - len(used))
        self.register_buffer("extra", extra, persistent=False)
        self._heads, self._after_attention = _heads, _after_attention
        self._swiglu, self._answer_loss = _swiglu, _answer_loss

    @torch.no_grad()
    def _initialize(self, generator: torch.Generator) -> None:
        """Matrices by the root of their inputs: narrow models need larger numbers than 0.02."""
        for name, parameter in self.weights.named_parameters():
            if parameter.ndim < 2 or name.endswith("bias"):
                continue
            inputs = parameter.shape[-2] if ".experts." in name else parameter.shape[-1]
            gain = OUTPUT_GAIN if "o_proj" in name else DOWN_GAIN if "down_proj" in name else 1.0
            deviation = gain * inputs**-0.5
            for part, fixed in (
                ("embed_tokens", EMBEDDING_DEVIATION),
                ("lm_head", HEAD_DEVIATION),
                ("router", ROUTER_DEVIATION),
            ):
                deviation = fixed if part in name else deviation
            parameter.normal_(0, deviation, generator=generator)

    @torch.no_grad()
    def start_from(self, vectors: npt.NDArray[np.float32]) -> None:
        """Embedding and unembedding from vectors [1 + used, D], the shared row first, root mean square 1."""
        rows = torch.from_numpy(np.ascontiguousarray(vectors, np.float32))
        expected = tuple(self.weights.lm_head.weight.shape)
        if tuple(rows.shape) != expected:
            raise ConfigError(f"the initial vectors are {tuple(rows.shape)}; expected {expected}")
        self.weights.model.embed_tokens.weight.copy_(rows * EMBEDDING_DEVIATION)
        self.weights.lm_head.weight.copy_(rows * HEAD_DEVIATION)

    def compile_parts(self) -> None:
        """Twice as fast after about a minute of compiling; needs a C++ compiler."""
        self._heads, self._after_attention = torch.compile(_heads), torch.compile(_after_attention)
        self._swiglu = torch.compile(_swiglu, dynamic=True)
        self._answer_loss = torch.compile(_answer_loss, dynamic=True)
        _Attention.weigh, _Attention.scaled = torch.compile(_weigh), torch.compile(_scaled)
        _Attention.weigh_backward = torch.compile(_weigh_backward)

    def loss(self, batch: RowBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses of the R places, the experts' balance, whether each place's token is likeliest).

        balance: 1 when the experts are used evenly, and a little for the size of the router's scores.
        """
        token_BT = torch.from_numpy(self._row_of[batch.token_id_BT])
        row, place = torch.from_numpy(batch.row_R), torch.from_numpy(batch.place_R)
        hidden, balance = self.hidden(
            token_BT, torch.from_numpy(batch.position_BT), torch.from_numpy(batch.segment_BT)
        )
        weights = self.weights
        loss_R, right_R = self._answer_loss(
            hidden[row, place - 1],
            weights.model.norm.weight,
            self.config.rms_norm_eps,
            weights.lm_head.weight,
            token_BT[row, place],
            self._extra(),
        )
        return loss_R.sum(), balance, right_R

    def _extra(self) -> Tensor:
        """Added to the logits: the shared row stands for as many tokens as share it."""
        return self.get_buffer("extra")

    def hidden(self, token_BT: Tensor, position_BT: Tensor, segment_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(the last layer's output [B, T, D] in float32, the experts' balance).

        token_BT: rows of `weights`.
        """
        B, T = token_BT.shape
        masks = row_masks(position_BT, segment_BT, self.config.window)
        cosine, sine = (
            table.view(B, T, 1, -1)
            for table in self.weights.angles(position_BT.flatten().numpy().astype(np.int32))
        )
        decoder = self.weights.model
        layers = cast(Iterator[Layer], iter(decoder.layers))
        x, balance = functional.embedding(token_BT, decoder.embed_tokens.weight), torch.zeros(())
        eps, size = self.config.rms_norm_eps, self.config.head_size
        for layer in layers:
            mixer, mlp = layer.self_attn, layer.mlp
            parts = [
                part
                for each in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
                for part in (each.weight, each.bias)
            ]
            q, k, v = self._heads(x, layer.input_layernorm.weight, eps, parts, cosine, sine, size)
            heads = _Attention.apply(q, k, v, mixer.sinks, masks[mixer.kind])  # type: ignore[no-untyped-call]
            x, h, chosen, weight, uneven = self._after_attention(
                x,
                heads,
                mixer.o_proj.weight,
                mixer.o_proj.bias,
                layer.post_attention_layernorm.weight,
                eps,
                mlp.router.weight,
                mlp.router.bias,
                self.config.num_active_experts,
            )
            x = self._with_experts(layer, x.flatten(0, 1), h, chosen, weight).view(x.shape)
            balance = balance + uneven / self.config.num_layers
        return x, balance

    def _with_experts(self, layer: Layer, x: Tensor, h: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Each expert multiplies the tokens that chose it; x + the weighted sum."""
        experts = layer.mlp.experts
        gate_up, down = experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj")
        if experts.fakes_mxfp4:
            gate_up, down = fake_quantize_mxfp4(gate_up, 1), fake_quantize_mxfp4(down, 1)  # type: ignore[assignment]
        parts = (gate_up, experts.gate_up_proj_bias, down, experts.down_proj_bias)
        gate_ups, gate_up_biases, downs, down_biases = (part.to(_BF16).unbind(0) for part in parts)
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.config.num_experts).tolist()
        token = order // self.config.num_active_experts
        inputs = torch.split(h.index_select(0, token), counts)
        wide = torch.cat([torch.addmm(gate_up_biases[e], y, gate_ups[e]) for e, y in enumerate(inputs)])
        middle = torch.split(self._swiglu(wide, self.config.swiglu_limit, self.config.swiglu_alpha), counts)
        out = torch.cat([torch.addmm(down_biases[e], y, downs[e]) for e, y in enumerate(middle)])
        return x.index_add(0, token, out.float() * weight.reshape(-1).index_select(0, order).unsqueeze(1))

    @torch.no_grad()
    def whole(self) -> TorchModel:
        """The model with the whole vocabulary, to be written: rows that were not used are the shared one."""
        with torch.device("meta"):
            model = TorchModel(self.config, torch.float32, "float")
        state = self.weights.state_dict()
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][torch.from_numpy(self._row_of)]
        model.load_state_dict(state, strict=True, assign=True)
        return model
