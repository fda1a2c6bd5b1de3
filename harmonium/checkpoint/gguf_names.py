"""What GGUF files call a gpt-oss: metadata -> ModelConfig, and the names of tensors.

Two families of files: those of llama.cpp's converter ("gpt-oss": q, k, v and gate, up apart), and Ollama's
("gptoss": either may be fused, as in OpenAI's files). Neither moves a number but for MXFP4's nibbles. RoPE is
not truncated, whatever the program does that the file was made for: so the model was trained.

Source: llama.cpp's conversion/gpt_oss.py, gguf-py/gguf/{constants,tensor_mapping}.py; ollama/ollama:
convert/convert_gptoss.go and model/models/gptoss/model.go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harmonium.checkpoint.files import shorten
from harmonium.checkpoint.gguf import GgufArray
from harmonium.checkpoint.model_config import ModelConfig, RopeConfig
from harmonium.checkpoint.names import EMBEDDING, UNEMBEDDING
from harmonium.errors import CheckpointError

ARCHITECTURES = ("gpt-oss", "gptoss")

_OUTER = {EMBEDDING: "token_embd.weight", "norm.weight": "output_norm.weight", UNEMBEDDING: "output.weight"}

_LAYER: dict[str, tuple[str, ...]] = {
    "attention_norm.weight": ("attn_norm.weight",),
    "attention.q.weight": ("attn_q.weight",),
    "attention.q.bias": ("attn_q.bias",),
    "attention.k.weight": ("attn_k.weight",),
    "attention.k.bias": ("attn_k.bias",),
    "attention.v.weight": ("attn_v.weight",),
    "attention.v.bias": ("attn_v.bias",),
    "attention.out.weight": ("attn_output.weight", "attn_out.weight"),
    "attention.out.bias": ("attn_output.bias", "attn_out.bias"),
    "attention.sinks": ("attn_sinks.weight", "attn_sinks"),
    "mlp_norm.weight": ("post_attention_norm.weight", "ffn_norm.weight"),
    "router.weight": ("ffn_gate_inp.weight",),
    "router.bias": ("ffn_gate_inp.bias",),
    "experts.down": ("ffn_down_exps.weight",),
    "experts.down.bias": ("ffn_down_exps.bias",),
    "experts.gate_up": ("ffn_gate_up_exps.weight",),
    "experts.gate_up.bias": ("ffn_gate_up_exps.bias",),
    "experts.gate": ("ffn_gate_exps.weight",),
    "experts.gate.bias": ("ffn_gate_exps.bias",),
    "experts.up": ("ffn_up_exps.weight",),
    "experts.up.bias": ("ffn_up_exps.bias",),
    "attention.qkv.weight": ("attn_qkv.weight",),
    "attention.qkv.bias": ("attn_qkv.bias",),
}


def stored_names(name: str) -> Iterator[str]:
    """What files call a tensor of ours, the commonest first."""
    if name in _OUTER:
        yield _OUTER[name]
        return
    _, layer, part = name.split(".", 2)
    for stored in _LAYER[part]:
        yield f"blk.{layer}.{stored}"


class Metadata:
    """Typed reading; `where` is what messages start with."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.table = table
        self.where = where
        self.architecture = table.get("general.architecture")
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{where}: general.architecture is {shorten(self.architecture)}; "
                "Harmonium runs 'gpt-oss' models"
            )

    def whole(self, name: str, high: int, default: int | None = None) -> int:
        """A whole number from 1. Raises CheckpointError."""
        key = f"{self.architecture}.{name}"
        value = self.table.get(key) or default
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= high:
            raise CheckpointError(
                f"{self.where}: {key} is {shorten(self.table.get(key))}; "
                f"expected a whole number from 1 to {high:,}"
            )
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A number in a range. Raises CheckpointError."""
        key = f"{self.architecture}.{name}"
        value = self.table.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise CheckpointError(
                f"{self.where}: {key} is {shorten(value)}; expected a number from {low:g} to {high:g}"
            )
        return float(value)

    @property
    def vocabulary_size(self) -> int | None:
        """Of the tokens listed; None where there are none."""
        tokens = self.table.get("tokenizer.ggml.tokens")
        return tokens.length if isinstance(tokens, GgufArray) else None


def read_model(metadata: Metadata, vocabulary_size: int) -> ModelConfig:
    """The model's shape. vocabulary_size: rows of the embedding. Raises CheckpointError."""
    size = metadata.whole("attention.key_length", 1 << 12)
    if metadata.whole("attention.value_length", 1 << 12, default=size) != size:
        raise CheckpointError(f"{metadata.where}: attention.value_length differs from key_length ({size})")
    num_layers = metadata.whole("block_count", 1024)
    width = metadata.whole("feed_forward_length", 1 << 20)
    config = ModelConfig(
        num_layers=num_layers,
        hidden_size=metadata.whole("embedding_length", 1 << 20),
        expert_size=metadata.whole("expert_feed_forward_length", 1 << 20, default=width),
        num_heads=metadata.whole("attention.head_count", 1 << 16),
        num_kv_heads=metadata.whole("attention.head_count_kv", 1 << 16),
        head_size=size,
        num_experts=metadata.whole("expert_count", 1 << 16),
        num_active_experts=metadata.whole("expert_used_count", 1 << 16),
        vocabulary_size=vocabulary_size,
        window=metadata.whole("attention.sliding_window", 1 << 30),
        max_context=metadata.whole("context_length", 1 << 30),
        layer_kinds=tuple("full" if layer % 2 else "window" for layer in range(num_layers)),
        rope=_rope(metadata),
        # A float32 in the file: 1e-5 is stored as 9.999999747e-06.
        rms_norm_eps=float(f"{metadata.number('attention.layer_norm_rms_epsilon', 1e-12, 1.0):.6g}"),
        swiglu_limit=7.0,
    )
    _check(config, metadata.where)
    return config


def _rope(metadata: Metadata) -> RopeConfig:
    kind = metadata.table.get(f"{metadata.architecture}.rope.scaling.type", "yarn")
    if kind != "yarn":
        raise CheckpointError(f"{metadata.where}: rope.scaling.type is {shorten(kind)}; expected 'yarn'")
    return RopeConfig(
        theta=metadata.number("rope.freq_base", 1.0, 1e12),
        factor=metadata.number("rope.scaling.factor", 1.0, 1e6),
        beta_fast=metadata.number("rope.scaling.yarn_beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=metadata.number("rope.scaling.yarn_beta_slow", 1e-6, 1e6, default=1.0),
        original_context=metadata.whole("rope.scaling.original_context_length", 1 << 30, default=4096),
        truncate=False,
    )


def _check(config: ModelConfig, where: str) -> None:
    rules = (
        (
            config.hidden_size % 32 == 0,
            f"embedding_length is {config.hidden_size}; expected a multiple of 32",
        ),
        (
            config.expert_size % 32 == 0,
            f"feed_forward_length is {config.expert_size}; expected a multiple of 32",
        ),
        (config.head_size % 2 == 0, f"attention.key_length is {config.head_size}; expected an even number"),
        (
            config.num_heads % config.num_kv_heads == 0,
            f"attention.head_count is {config.num_heads}; expected a multiple of head_count_kv "
            f"({config.num_kv_heads})",
        ),
        (
            config.num_active_experts <= config.num_experts,
            f"expert_used_count is {config.num_active_experts}; the model has {config.num_experts} experts",
        ),
        (
            config.rope.factor <= 1 or config.rope.beta_fast > config.rope.beta_slow,
            f"yarn_beta_fast is {config.rope.beta_fast:g}; expected more than yarn_beta_slow",
        ),
    )
    for holds, message in rules:
        if not holds:
            raise CheckpointError(f"{where}: {message}")
