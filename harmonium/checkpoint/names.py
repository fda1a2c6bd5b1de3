"""Canonical names of tensors <- what Hugging Face and OpenAI's original files call them.

Facts about the two layouts, none of which moves a number: the original fuses q, k and v as rows of one
matrix, in that order; query head h belongs to key/value head h // R in both; gate and up are interleaved in
both; sinks are one number a query head. Plain bf16 experts lie transposed: [E, in, out].

Source: openai/gpt-oss:gpt_oss/torch/{model,weights}.py; huggingface/transformers:
src/transformers/models/gpt_oss/{convert_gpt_oss_weights_to_hf,modeling_gpt_oss}.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from harmonium.checkpoint.config_json import Layout
from harmonium.checkpoint.files import shorten
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.mxfp4 import BLOCK_BYTES, BLOCK_SIZE
from harmonium.errors import CheckpointError

ExpertFormat = Literal["mxfp4", "bf16"]

Shape = tuple[int, ...]

EMBEDDING = "embedding.weight"
UNEMBEDDING = "unembedding.weight"

_HUGGINGFACE_OUTER = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    UNEMBEDDING: "lm_head.weight",
}

_HUGGINGFACE_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q.weight": "self_attn.q_proj.weight",
    "attention.q.bias": "self_attn.q_proj.bias",
    "attention.k.weight": "self_attn.k_proj.weight",
    "attention.k.bias": "self_attn.k_proj.bias",
    "attention.v.weight": "self_attn.v_proj.weight",
    "attention.v.bias": "self_attn.v_proj.bias",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.out.bias": "self_attn.o_proj.bias",
    "attention.sinks": "self_attn.sinks",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "router.weight": "mlp.router.weight",
    "router.bias": "mlp.router.bias",
    "experts.gate_up.blocks": "mlp.experts.gate_up_proj_blocks",
    "experts.gate_up.scales": "mlp.experts.gate_up_proj_scales",
    "experts.gate_up.weight": "mlp.experts.gate_up_proj",
    "experts.gate_up.bias": "mlp.experts.gate_up_proj_bias",
    "experts.down.blocks": "mlp.experts.down_proj_blocks",
    "experts.down.scales": "mlp.experts.down_proj_scales",
    "experts.down.weight": "mlp.experts.down_proj",
    "experts.down.bias": "mlp.experts.down_proj_bias",
}

_ORIGINAL_OUTER = {
    EMBEDDING: "embedding.weight",
    "norm.weight": "norm.scale",
    UNEMBEDDING: "unembedding.weight",
}

_ORIGINAL_LAYER = {
    "attention_norm.weight": "attn.norm.scale",
    "attention.q.weight": "attn.qkv.weight",
    "attention.q.bias": "attn.qkv.bias",
    "attention.k.weight": "attn.qkv.weight",
    "attention.k.bias": "attn.qkv.bias",
    "attention.v.weight": "attn.qkv.weight",
    "attention.v.bias": "attn.qkv.bias",
    "attention.out.weight": "attn.out.weight",
    "attention.out.bias": "attn.out.bias",
    "attention.sinks": "attn.sinks",
    "mlp_norm.weight": "mlp.norm.scale",
    "router.weight": "mlp.gate.weight",
    "router.bias": "mlp.gate.bias",
    "experts.gate_up.blocks": "mlp.mlp1_weight.blocks",
    "experts.gate_up.scales": "mlp.mlp1_weight.scales",
    "experts.gate_up.bias": "mlp.mlp1_bias",
    "experts.down.blocks": "mlp.mlp2_weight.blocks",
    "experts.down.scales": "mlp.mlp2_weight.scales",
    "experts.down.bias": "mlp.mlp2_bias",
}

_LAYER_NUMBER = {
    "huggingface": re.compile(r"model\.layers\.(\d{1,9})\."),
    "original": re.compile(r"block\.(\d{1,9})\."),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor comes from: rows first_row ... first_row + shape[0] of the stored tensor.

    dtype: "BF16" or "U8". stored_shape: what the file must say of the tensor called `stored`.
    """

    name: str
    dtype: str
    shape: Shape
    stored: str
    stored_shape: Shape
    first_row: int = 0


def canonical_tensors(config: ModelConfig, expert_format: ExpertFormat) -> Iterator[tuple[str, str, Shape]]:
    """(canonical name, dtype, shape) of every tensor that a model has, in the order of the computation."""
    D, V = config.hidden_size, config.vocabulary_size
    yield EMBEDDING, "BF16", (V, D)
    for layer in range(config.num_layers):
        for name, shape in _layer_tensors(config, expert_format):
            is_packed = name.endswith((".blocks", ".scales"))
            yield f"layers.{layer}.{name}", "U8" if is_packed else "BF16", shape
    yield "norm.weight", "BF16", (D,)
    yield UNEMBEDDING, "BF16", (V, D)


def _layer_tensors(config: ModelConfig, expert_format: ExpertFormat) -> Iterator[tuple[str, Shape]]:
    D, F, E, H = config.hidden_size, config.expert_size, config.num_experts, config.num_heads
    rows = {"q": H * config.head_size, "k": config.num_kv_heads * config.head_size}
    rows["v"] = rows["k"]
    yield "attention_norm.weight", (D,)
    for part, size in rows.items():
        yield f"attention.{part}.weight", (size, D)
        yield f"attention.{part}.bias", (size,)
    yield "attention.out.weight", (D, rows["q"])
    yield "attention.out.bias", (D,)
    yield "attention.sinks", (H,)
    yield "mlp_norm.weight", (D,)
    yield "router.weight", (E, D)
    yield "router.bias", (E,)
    for part, outputs, inputs in (("gate_up", 2 * F, D), ("down", D, F)):
        if expert_format == "mxfp4":
            yield f"experts.{part}.blocks", (E, outputs, inputs // BLOCK_SIZE, BLOCK_BYTES)
            yield f"experts.{part}.scales", (E, outputs, inputs // BLOCK_SIZE)
        else:
            yield f"experts.{part}.weight", (E, inputs, outputs)
        yield f"experts.{part}.bias", (E, outputs)


def stored_name(name: str, layout: Layout) -> str:
    """What a layout calls a canonical tensor. q, k and v share a name in the original layout."""
    outer = _HUGGINGFACE_OUTER if layout == "huggingface" else _ORIGINAL_OUTER
    if name in outer:
        return outer[name]
    _, layer, part = name.split(".", 2)
    if layout == "huggingface":
        return f"model.layers.{layer}.{_HUGGINGFACE_LAYER[part]}"
    return f"block.{layer}.{_ORIGINAL_LAYER[part]}"


def tensor_sources(config: ModelConfig, layout: Layout, expert_format: ExpertFormat) -> Iterator[Source]:
    """Every canonical tensor with its place in a layout. Only Hugging Face's has bf16 experts."""
    assert layout == "huggingface" or expert_format == "mxfp4"
    q_rows, kv_rows = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    first_row = {"q": 0, "k": q_rows, "v": q_rows + kv_rows}
    for name, dtype, shape in canonical_tensors(config, expert_format):
        stored = stored_name(name, layout)
        part = name.split(".")[-2]
        if layout == "original" and ".attn.qkv." in stored:
            fused = (q_rows + 2 * kv_rows, *shape[1:])
            yield Source(name, dtype, shape, stored, fused, first_row[part])
        else:
            yield Source(name, dtype, shape, stored, shape)


def find_expert_format(stored: Iterable[str], layout: Layout, where: str) -> ExpertFormat:
    """The format of the experts, by the names in the files. Raises CheckpointError for both or neither."""
    packed = ("gate_up_proj_blocks", "down_proj_blocks", "mlp1_weight.blocks", "mlp2_weight.blocks")
    plain = ("experts.gate_up_proj", "experts.down_proj", "mlp.mlp1_weight", "mlp.mlp2_weight")
    names = sorted(stored)
    first_packed = next((name for name in names if name.endswith(packed)), None)
    first_plain = next((name for name in names if name.endswith(plain)), None)
    if first_packed and first_plain:
        both = f"{shorten(first_packed)} (MXFP4) and {shorten(first_plain)} (bf16)"
        raise CheckpointError(f"{where}: holds experts in two formats, {both}; expected one")
    if first_plain and layout == "original":
        raise CheckpointError(
            f"{where}: tensor {shorten(first_plain)} is plain; experts of the original layout must be MXFP4"
        )
    if first_packed:
        return "mxfp4"
    if first_plain:
        return "bf16"
    expected = stored_name("layers.0.experts.gate_up.blocks", layout)
    raise CheckpointError(f"{where}: has no experts; expected tensors such as {expected}")


def highest_layer(stored: Iterable[str], layout: Layout) -> int:
    """The largest layer number in names of this layout; -1 where there is none."""
    matches = (_LAYER_NUMBER[layout].match(name) for name in stored)
    return max((int(match[1]) for match in matches if match), default=-1)
