"""The shape of a gpt-oss model: what config.json says, in one frozen dataclass.

Field names are ours; `checkpoint.config_json` reads the Hugging Face and the OpenAI spelling into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["window", "full"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. factor 1.0 means plain RoPE; otherwise YaRN with these numbers.

    Source: YaRN, arXiv 2309.00071; the released config has factor 32, beta_fast 32, beta_slow 1,
    original_context 4096 and truncate false.
    """

    theta: float
    factor: float
    beta_fast: float
    beta_slow: float
    original_context: int
    truncate: bool


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of a gpt-oss model. The dimension letter of docs/architecture.md stands behind each.

    num_layers L, hidden_size D, expert_size F, num_heads H, num_kv_heads G, head_size K, num_experts E,
    num_active_experts A, vocabulary_size V; window: positions that a window layer sees, itself included;
    max_context: the longest sequence; layer_kinds: one of "window", "full" for each layer.
    """

    num_layers: int
    hidden_size: int
    expert_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    num_experts: int
    num_active_experts: int
    vocabulary_size: int
    window: int
    max_context: int
    layer_kinds: tuple[LayerKind, ...]
    rope: RopeConfig
    rms_norm_eps: float
    swiglu_limit: float
    swiglu_alpha: float = 1.702

    @property
    def group_size(self) -> int:
        """R = H / G: query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads
