"""Random LoRA adapters in PEFT's files, written from its layout with NumPy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import encode_bfloat16
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.safetensors import write_safetensors

Floats = npt.NDArray[np.float32]

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
PARAMETERS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight")


def lora_tensors(
    model: ModelConfig,
    *,
    modules: Sequence[str] = MODULES,
    parameters: Sequence[str] = PARAMETERS,
    rank: int = 3,
    seed: int = 0,
    strength: float = 0.1,
) -> Iterator[tuple[str, Floats]]:
    """(key, values) as PEFT saves them; the same rank everywhere."""
    D, F, E = model.hidden_size, model.expert_size, model.num_experts
    q, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    sizes = {"q_proj": (D, q), "k_proj": (D, kv), "v_proj": (D, kv), "o_proj": (q, D)}
    both = sum("experts" in parameter for parameter in parameters) == 2
    inner = "mlp.experts.base_layer" if both else "mlp.experts"
    places = {
        "mlp.router.weight": ("mlp.router", 1, D, E),
        "mlp.experts.gate_up_proj": (inner, E, D, 2 * F),
        "mlp.experts.down_proj": ("mlp.experts", E, F, D),
    }
    rng = np.random.default_rng(seed)
    for layer in range(model.num_layers):
        listed = [(f"self_attn.{module}", 1, *sizes[module]) for module in modules]
        listed += [places[parameter] for parameter in parameters]
        for module, experts, inputs, outputs in listed:
            key = f"base_model.model.model.layers.{layer}.{module}.lora_"
            a = rng.standard_normal((rank * experts, inputs)) / inputs**0.5
            yield f"{key}A.weight", a.astype(np.float32)
            b = strength * rng.standard_normal((outputs, rank * experts))
            yield f"{key}B.weight", b.astype(np.float32)


def write_lora(
    folder: Path,
    tensors: Iterator[tuple[str, Floats]] | list[tuple[str, Floats]],
    *,
    dtype: str = "F32",
    **config: Any,
) -> Path:
    """The two files; config: keys of adapter_config.json that are not as below."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "peft_type": "LORA",
        "peft_version": "0.21.2",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "somewhere/else",
        "bias": "none",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "target_modules": list(MODULES),
        "target_parameters": list(PARAMETERS),
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(table))
    stored: list[tuple[str, str, npt.NDArray[Any]]] = []
    for name, values in tensors:
        if dtype == "BF16":
            stored.append((name, dtype, encode_bfloat16(values)))
        else:
            stored.append((name, dtype, values.astype(np.float16 if dtype == "F16" else np.float32)))
    write_safetensors(folder / "adapter_model.safetensors", stored)
    return folder


def make_lora(
    folder: Path, model: ModelConfig, *, seed: int = 0, dtype: str = "F32", strength: float = 0.1
) -> Path:
    """An adapter of rank 3 on everything that an adapter may change."""
    return write_lora(folder, lora_tensors(model, seed=seed, strength=strength), dtype=dtype)
