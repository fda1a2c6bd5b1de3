"""config.json -> ModelConfig: the Hugging Face spelling (old and new) and that of OpenAI's original files.

Nothing is guessed: a value that decides the arithmetic must be there, of the right kind and in range, and a
setting that we do not compute is refused by name.

Source: transformers' GptOssConfig (models/gpt_oss/configuration_gpt_oss.py) and modeling_rope_utils.py;
ModelConfig in openai/gpt-oss:gpt_oss/torch/model.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harmonium.checkpoint.files import MAX_CONFIG_BYTES, read_json_object, shorten
from harmonium.checkpoint.model_config import LayerKind, ModelConfig, RopeConfig
from harmonium.checkpoint.mxfp4 import BLOCK_SIZE
from harmonium.errors import CheckpointError

Layout = Literal["huggingface", "original"]

_LAYER_KIND: dict[str, LayerKind] = {"sliding_attention": "window", "full_attention": "full"}

_RMS_NORM_EPS = 1e-5
"""Of the original layout, whose config does not say it. Source: RMSNorm in gpt_oss/torch/model.py."""


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What config.json says: the model, the layout whose spelling it has, and what concerns the files alone.

    is_tied: the unembedding may be absent and is the embedding then.
    """

    model: ModelConfig
    layout: Layout
    is_tied: bool


def read_config(path: Path) -> CheckpointConfig:
    """Read and check a config.json of either spelling. Raises CheckpointError."""
    table = read_json_object(path, MAX_CONFIG_BYTES)
    fields = _Fields(table, str(path))
    if "model_type" not in table and "rope_scaling_factor" in table:
        return CheckpointConfig(_checked(_original(fields), fields), "original", is_tied=False)
    model_type = table.get("model_type")
    if model_type != "gpt_oss":
        raise CheckpointError(f"{path}: model_type is {shorten(model_type)}; Harmonium runs 'gpt_oss' models")
    _refuse_unsupported(fields)
    model = _checked(_huggingface(fields), fields)
    return CheckpointConfig(model, "huggingface", is_tied=fields.flag("tie_word_embeddings", False))


class _Fields:
    """Typed reading of one JSON object; `where` is what messages start with."""

    def __init__(self, table: Mapping[str, Any], where: str) -> None:
        self.table = table
        self.where = where

    def error(self, name: str, expected: str) -> CheckpointError:
        if name not in self.table:
            return CheckpointError(f"{self.where}: {name} is missing; expected {expected}")
        return CheckpointError(f"{self.where}: {name} is {shorten(self.table[name])}; expected {expected}")

    def whole(self, name: str, high: int, low: int = 1) -> int:
        value = self.table.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"a whole number from {low:,} to {high:,}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self.table.get(name)
        if value is None and default is not None:
            return default
        # An int may be too large for a float, so the range is looked at first; NaN fails it.
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(name, f"a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.table.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def either(self, names: tuple[str, str], high: int) -> int:
        """A whole number that has two spellings; where both are there they must agree."""
        found = [self.whole(name, high) for name in names if self.table.get(name) is not None]
        if not found:
            raise self.error(names[0], f"a whole number from 1 to {high:,}")
        if found[0] != found[-1]:
            raise CheckpointError(
                f"{self.where}: {names[0]} is {found[0]} and {names[1]} is {found[1]}; expected the same"
            )
        return found[0]


def _huggingface(fields: _Fields) -> ModelConfig:
    num_layers = fields.whole("num_hidden_layers", 1024)
    kinds = _layer_kinds(fields, num_layers)
    max_context = fields.whole("max_position_embeddings", 1 << 30)
    # A model with full attention only may say null.
    has_window = "window" in kinds or fields.table.get("sliding_window") is not None
    return ModelConfig(
        num_layers=num_layers,
        num_experts=fields.either(("num_local_experts", "num_experts"), 1 << 16),
        num_active_experts=fields.either(("num_experts_per_tok", "experts_per_token"), 1 << 16),
        window=fields.whole("sliding_window", 1 << 30) if has_window else max_context,
        max_context=max_context,
        layer_kinds=kinds,
        rope=_huggingface_rope(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0),
        swiglu_limit=fields.number("swiglu_limit", 1e-3, 1e6, default=7.0),
        swiglu_alpha=fields.number("swiglu_alpha", 1e-3, 1e3, default=1.702),
        **_sizes(fields),
    )


def _original(fields: _Fields) -> ModelConfig:
    num_layers = fields.whole("num_hidden_layers", 1024)
    original_context = fields.whole("initial_context_length", 1 << 30)
    factor = fields.number("rope_scaling_factor", 1.0, 1e6)
    rope = RopeConfig(
        theta=fields.number("rope_theta", 1.0, 1e12),
        factor=factor,
        beta_fast=fields.number("rope_ntk_beta", 1e-6, 1e6),
        beta_slow=fields.number("rope_ntk_alpha", 1e-6, 1e6),
        original_context=original_context,
        truncate=False,
    )
    return ModelConfig(
        num_layers=num_layers,
        num_experts=fields.whole("num_experts", 1 << 16),
        num_active_experts=fields.whole("experts_per_token", 1 << 16),
        window=fields.whole("sliding_window", 1 << 30),
        max_context=min(round(original_context * factor), 1 << 30),
        layer_kinds=_alternating(num_layers),
        rope=rope,
        rms_norm_eps=_RMS_NORM_EPS,
        swiglu_limit=fields.number("swiglu_limit", 1e-3, 1e6, default=7.0),
        **_sizes(fields),
    )


def _sizes(fields: _Fields) -> dict[str, Any]:
    """The sizes that both spellings name alike."""
    return {
        "hidden_size": fields.whole("hidden_size", 1 << 20),
        "expert_size": fields.whole("intermediate_size", 1 << 20),
        "num_heads": fields.whole("num_attention_heads", 1 << 16),
        "num_kv_heads": fields.whole("num_key_value_heads", 1 << 16),
        "head_size": fields.whole("head_dim", 1 << 12),
        "vocabulary_size": fields.whole("vocab_size", 1 << 24),
    }


def _checked(config: ModelConfig, fields: _Fields) -> ModelConfig:
    """What must hold between the values."""
    rules = (
        (
            config.hidden_size % BLOCK_SIZE == 0,
            "hidden_size",
            f"a multiple of {BLOCK_SIZE} (the MXFP4 block)",
        ),
        (
            config.expert_size % BLOCK_SIZE == 0,
            "intermediate_size",
            f"a multiple of {BLOCK_SIZE} (the MXFP4 block)",
        ),
        (config.head_size % 2 == 0, "head_dim", "an even number (rotary embedding turns pairs)"),
        (
            config.num_heads % config.num_kv_heads == 0,
            "num_attention_heads",
            f"a multiple of num_key_value_heads ({config.num_kv_heads})",
        ),
    )
    for holds, name, expected in rules:
        if not holds:
            raise fields.error(name, expected)
    if config.num_active_experts > config.num_experts:
        raise CheckpointError(
            f"{fields.where}: {config.num_active_experts} experts are active for a token; "
            f"the model has {config.num_experts}"
        )
    rope = config.rope
    if rope.factor > 1 and rope.beta_fast <= rope.beta_slow:
        raise CheckpointError(
            f"{fields.where}: RoPE's beta_fast is {rope.beta_fast:g}; "
            f"expected more than beta_slow ({rope.beta_slow:g})"
        )
    return config


def _alternating(num_layers: int) -> tuple[LayerKind, ...]:
    """Even layers see a window, odd layers everything. Source: AttentionBlock in gpt_oss/torch/model.py."""
    return tuple("full" if layer % 2 else "window" for layer in range(num_layers))


def _layer_kinds(fields: _Fields, num_layers: int) -> tuple[LayerKind, ...]:
    given = fields.table.get("layer_types")
    if given is None:
        return _alternating(num_layers)
    if not isinstance(given, list) or len(given) != num_layers:
        found = f"{len(given)} entries" if isinstance(given, list) else shorten(given)
        raise CheckpointError(
            f"{fields.where}: layer_types has {found}; expected {num_layers}, one for each layer"
        )
    for layer, kind in enumerate(given):
        if not isinstance(kind, str) or kind not in _LAYER_KIND:
            raise CheckpointError(
                f"{fields.where}: layer_types[{layer}] is {shorten(kind)}; "
                f"expected one of {', '.join(_LAYER_KIND)}"
            )
    return tuple(_LAYER_KIND[kind] for kind in given)


def _huggingface_rope(fields: _Fields) -> RopeConfig:
    """rope_parameters (Transformers 5, rope_theta inside) or rope_scaling (before, rope_theta beside it)."""
    name = "rope_parameters" if fields.table.get("rope_parameters") is not None else "rope_scaling"
    given = fields.table.get(name)
    if not isinstance(given, dict):
        # Absent and null meant different things to different versions of Transformers, so neither is guessed.
        raise fields.error(name, "an object with rope_type 'yarn' or 'default'")
    rope = _Fields(given, f"{fields.where}: {name}")
    theta = rope if given.get("rope_theta") is not None else fields
    rope_type = given.get("rope_type", given.get("type"))
    if rope_type not in ("yarn", "default"):
        raise CheckpointError(
            f"{rope.where}: rope_type is {shorten(rope_type)}; expected 'yarn' or 'default'"
        )
    for place in (rope, fields):
        if place.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            raise place.error("partial_rotary_factor", "1, or nothing")
    base = theta.number("rope_theta", 1.0, 1e12)
    if rope_type == "default":
        max_context = fields.whole("max_position_embeddings", 1 << 30)
        return RopeConfig(base, 1.0, 32.0, 1.0, original_context=max_context, truncate=False)
    has_own = given.get("original_max_position_embeddings") is not None
    original = (
        rope.whole("original_max_position_embeddings", 1 << 30)
        if has_own
        else fields.whole("initial_context_length", 1 << 30)
    )
    factor = rope.number("factor", 1.0, 1e6)
    _refuse_attention_factor(rope, factor)
    return RopeConfig(
        theta=base,
        factor=factor,
        beta_fast=rope.number("beta_fast", 1e-6, 1e6, default=32.0),
        beta_slow=rope.number("beta_slow", 1e-6, 1e6, default=1.0),
        original_context=original,
        truncate=rope.flag("truncate", True),
    )


def _refuse_attention_factor(rope: _Fields, factor: float) -> None:
    """YaRN's scale of the cosines follows from the factor here; a config that sets another is refused."""
    expected = 0.1 * math.log(factor) + 1.0
    if not math.isclose(rope.number("attention_factor", 0.0, 1e6, default=expected), expected, rel_tol=1e-4):
        raise rope.error("attention_factor", f"{expected:.6f} (0.1 ln factor + 1), or nothing")
    for name in ("mscale", "mscale_all_dim"):
        if rope.table.get(name) is not None:
            raise rope.error(name, "nothing")


def _refuse_unsupported(fields: _Fields) -> None:
    """Settings that would change the arithmetic into one that we do not compute."""
    table = fields.table
    if table.get("hidden_act", "silu") != "silu":
        raise fields.error("hidden_act", "'silu'")
    if not fields.flag("attention_bias", True):
        raise fields.error("attention_bias", "true")
    quantization = table.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, dict):
        raise fields.error("quantization_config", "an object")
    method = quantization.get("quant_method")
    if method != "mxfp4":
        raise CheckpointError(
            f"{fields.where}: quant_method is {shorten(method)}; "
            "expected 'mxfp4', or no quantization_config (bf16)"
        )
