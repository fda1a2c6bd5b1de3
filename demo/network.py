"""gpt-oss for training on few tokens a second: bf16 products, float32 everything else, padded rows.

The same arithmetic as `harmonium.model.reference`, over the compact vocabulary. Processors with AVX-512 bf16
multiply five times faster in bf16 than PyTorch does in float32; that, and products over whole rows, is what
makes the training fit into an hour.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WINDOW = 128
SHIFTED_SCORE_LIMIT = 60.0
"""exp() of it is far from overflow; scores of a trained model stay below."""
_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """By dimension letter (docs/architecture.md); V: rows of the compact vocabulary."""

    V: int
    L: int = 4
    D: int = 256
    H: int = 6
    G: int = 2
    K: int = 64
    E: int = 8
    A: int = 2
    F: int = 256


def row_masks(position_BT: Tensor, segment_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Additive masks [B, 1, T, T] of window and full layers: the opening (segment 0), one's own segment."""
    step = torch.arange(position_BT.shape[1])
    causal = step[None, :, None] >= step[None, None, :]
    full = causal & ((segment_BT[:, :, None] == segment_BT[:, None, :]) | (segment_BT[:, None, :] == 0))
    window = full & (position_BT[:, :, None] - position_BT[:, None, :] < WINDOW)
    zero, never = torch.zeros(1, dtype=_BF16), torch.full((1,), -1e30, dtype=_BF16)
    return torch.where(window, zero, never).unsqueeze(1), torch.where(full, zero, never).unsqueeze(1)


def fake_mxfp4(weight: Tensor) -> Tensor:
    """The weight as MXFP4 holds it (harmonium.checkpoint.mxfp4); gradients pass unchanged."""
    blocks = weight.detach().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scale = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    size = (blocks / scale).abs()
    coarse = torch.where(size < 4, size.round(), (size / 2).round() * 2)
    rounded = torch.where(size < 2, (size * 2).round() / 2, coarse).clamp(max=6.0)
    return weight + (torch.copysign(rounded, blocks) * scale).flatten(-2) - weight.detach()


def rope_frequencies(head_size: int) -> tuple[Tensor, float]:
    """Angles a position, and the factor on cosine and sine: YaRN with the released models' numbers."""
    theta, factor, fast, slow, original = 150_000.0, 32.0, 32.0, 1.0, 4096
    half = head_size // 2
    index = torch.arange(half, dtype=torch.float64)
    plain = theta ** (-index / half)
    low, high = (
        half * math.log(original / (turns * 2 * math.pi)) / math.log(theta) for turns in (fast, slow)
    )
    ramp = ((index - low) / (high - low)).clamp(0, 1)
    return (plain / factor * ramp + plain * (1 - ramp)).float(), 0.1 * math.log(factor) + 1


# The functions below are compiled: each becomes one or two loops over memory.


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, 1e-5)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.linear(x, weight.to(_BF16), bias.to(_BF16))


def _heads(
    x: Tensor, norm: Tensor, weights: list[Tensor], cosine: Tensor, sine: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (scaled), keys and values, each [B, H, T, K] in bf16."""
    B, T, _ = x.shape
    query, query_bias, key, key_bias, value, value_bias = weights
    H, G = query.shape[0] // size, key.shape[0] // size
    h = _norm(x, norm).to(_BF16)

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
    router: Tensor,
    router_bias: Tensor,
    A: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The residual, the experts' input, chosen experts, their weights, and the loss of an uneven choice."""
    B, T, D = x.shape
    x = x + _linear(heads.transpose(1, 2).reshape(B, T, -1), out, out_bias).float()
    h = _norm(x, norm).view(B * T, D)
    logits = functional.linear(h, router, router_bias)
    top, chosen = logits.topk(A, -1)
    E = router.shape[0]
    share = functional.one_hot(chosen, E).float().sum(1).mean(0) / A
    balance = (logits.softmax(-1).mean(0) * share).sum() * E + 1e-3 * logits.logsumexp(-1).square().mean()
    return x, h.to(_BF16), chosen, top.softmax(-1), balance


def _swiglu(gate_up: Tensor) -> Tensor:
    y = gate_up.float()
    gate, up = y[..., 0::2].clamp(max=7.0), y[..., 1::2].clamp(-7.0, 7.0)
    return ((up + 1) * gate * torch.sigmoid(gate * 1.702)).to(_BF16)


def _answer_loss(
    x: Tensor, norm: Tensor, head: Tensor, target: Tensor, extra: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and rightness of each row. extra: the shared class stands for many tokens with the same logit."""
    logits = functional.linear(_norm(x, norm).to(_BF16), head.to(_BF16)).float() + extra
    return functional.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target


class _Attention(torch.autograd.Function):
    """Attention with sinks. The maximum is not subtracted: scores are clamped instead, which saves a pass."""

    weigh: Callable[..., Any] = staticmethod(_weigh)
    scaled: Callable[..., Any] = staticmethod(_scaled)
    weigh_backward: Callable[..., Any] = staticmethod(_weigh_backward)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sink: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        B, H, T, K = q.shape
        scores = torch.bmm(q.view(B * H, T, K), k.view(B * H, T, K).transpose(1, 2)).view(B, H, T, T)
        e, scale, sink_share = _Attention.weigh(scores, mask, sink)
        plain = torch.bmm(e.view(B * H, T, T), v.view(B * H, T, K)).view(B, H, T, K)
        out: Tensor = _Attention.scaled(plain, scale)
        ctx.save_for_backward(q, k, v, e, scale, sink_share, out)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:  # type: ignore[override]
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


class Layer(nn.Module):
    """One block. n: norms; q, k, v, o: attention; r: router; gu, dn: experts; ...b: biases."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()

        def weight(*shape: int, gain: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * gain / math.sqrt(shape[-1]))

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape))

        self.n1, self.n2 = nn.Parameter(torch.ones(s.D)), nn.Parameter(torch.ones(s.D))
        self.q, self.k, self.v = (weight(heads * s.K, s.D) for heads in (s.H, s.G, s.G))
        self.o = weight(s.D, s.H * s.K, gain=0.5)
        self.qb, self.kb, self.vb, self.ob = zeros(s.H * s.K), zeros(s.G * s.K), zeros(s.G * s.K), zeros(s.D)
        self.sink = zeros(s.H)
        self.rw, self.rb = nn.Parameter(torch.randn(s.E, s.D) * 0.02), zeros(s.E)
        self.gu, self.gub = weight(s.E, 2 * s.F, s.D), zeros(s.E, 2 * s.F)
        self.dn, self.dnb = weight(s.E, s.D, s.F, gain=0.3), zeros(s.E, s.D)


class Network(nn.Module):
    """The whole model. quantizes_experts: compute with the experts as MXFP4 will hold them."""

    def __init__(self, sizes: Sizes, vocabulary_size: int = 201_088) -> None:
        super().__init__()
        self.sizes = sizes
        self.emb = nn.Parameter(torch.randn(sizes.V, sizes.D) * 0.5)
        self.head = nn.Parameter(torch.randn(sizes.V, sizes.D) * 0.02)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.L))
        self.nf = nn.Parameter(torch.ones(sizes.D))
        frequencies, self.rope_factor = rope_frequencies(sizes.K)
        extra = torch.zeros(sizes.V)
        extra[0] = math.log(vocabulary_size - sizes.V + 1)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.register_buffer("extra", extra, persistent=False)
        self.quantizes_experts = False
        self._heads, self._after_attention = _heads, _after_attention
        self._swiglu, self._answer_loss = _swiglu, _answer_loss

    def compile_parts(self) -> None:
        """Twice as fast after about a minute of compiling; needs a C++ compiler."""
        self._heads, self._after_attention = torch.compile(_heads), torch.compile(_after_attention)
        self._swiglu = torch.compile(_swiglu, dynamic=True)
        self._answer_loss = torch.compile(_answer_loss, dynamic=True)
        _Attention.weigh, _Attention.scaled = torch.compile(_weigh), torch.compile(_scaled)
        _Attention.weigh_backward = torch.compile(_weigh_backward)

    def hidden(
        self, token_BT: Tensor, position_BT: Tensor, masks: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The last layer's output [B, T, D], and the mean loss of uneven choices of experts."""
        angle = position_BT.float().unsqueeze(-1) * self.frequencies
        cosine, sine = ((f(angle) * self.rope_factor).unsqueeze(2) for f in (torch.cos, torch.sin))
        x, balance = functional.embedding(token_BT, self.emb), torch.zeros(())
        for index, layer in enumerate(self.layers):
            weights = [layer.q, layer.qb, layer.k, layer.kb, layer.v, layer.vb]
            q, k, v = self._heads(x, layer.n1, weights, cosine, sine, self.sizes.K)
            heads = _Attention.apply(q, k, v, layer.sink, masks[index % 2])
            x, h, chosen, weight, uneven = self._after_attention(
                x, heads, layer.o, layer.ob, layer.n2, layer.rw, layer.rb, self.sizes.A
            )
            x = self._with_experts(layer, x.flatten(0, 1), h, chosen, weight).view(x.shape)
            balance = balance + uneven / self.sizes.L
        return x, balance

    def _with_experts(self, layer: nn.Module, x: Tensor, h: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        """Each expert multiplies the tokens that chose it; x + the weighted sum."""
        gate_up, down = layer.gu, layer.dn
        if self.quantizes_experts:
            gate_up, down = fake_mxfp4(gate_up), fake_mxfp4(down)
        gate_up, down, gate_up_bias, down_bias = (
            part.to(_BF16) for part in (gate_up, down, layer.gub, layer.dnb)
        )
        flat = chosen.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.sizes.E).tolist()
        token = order // self.sizes.A
        inputs = h.index_select(0, token).split(counts)
        wide = torch.cat([functional.linear(y, gate_up[e], gate_up_bias[e]) for e, y in enumerate(inputs)])
        middle = self._swiglu(wide).split(counts)
        out = torch.cat([functional.linear(y, down[e], down_bias[e]) for e, y in enumerate(middle)])
        return x.index_add(0, token, out.float() * weight.reshape(-1).index_select(0, order).unsqueeze(1))

    def answer_loss(self, rows: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and rightness of each row of the last layer's output."""
        return self._answer_loss(rows, self.nf, self.head, target, self.extra)
