"""Writes GGUF files for tests: tiny models in either family's layout, and headers that lie."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.gguf_blocks import encode_q8, join_mxfp4
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.testing import random_tensors

TYPE_NUMBERS = {"F32": 0, "F16": 1, "MXFP4_PAIRS": 4, "Q8_0": 8, "BF16": 30, "MXFP4": 39}

Tensors = list[tuple[str, str, npt.NDArray[Any]]]
"""(name, type, bytes or numbers [slowest axis first])."""


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def value_bytes(value: object) -> bytes:
    """A metadata value with its type: bool, int (uint32), float (float32), text, list of texts."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    assert isinstance(value, list)
    return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)


def gguf_bytes(
    metadata: Mapping[str, object], tensors: Tensors, *, version: int = 3, alignment: int = 32
) -> bytes:
    """A whole file."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(text(name) + value_bytes(value) for name, value in metadata.items())
    body = b""
    for name, kind, array in tensors:
        block, size = {"MXFP4": (32, 17), "MXFP4_PAIRS": (32, 17), "Q8_0": (32, 34)}.get(kind, (1, 1))
        shape = (*array.shape[:-1], array.shape[-1] // size * block)
        body += b"\0" * (-len(body) % alignment)
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", TYPE_NUMBERS[kind], len(body))
        body += np.ascontiguousarray(array).tobytes()
    return head + b"\0" * (-len(head) % alignment) + body


def metadata_of(config: ModelConfig, architecture: str = "gpt-oss") -> dict[str, object]:
    """What llama.cpp's converter, or Ollama's, would say of a model."""
    fields: dict[str, object] = {
        "block_count": config.num_layers,
        "context_length": config.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.expert_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.sliding_window": config.window,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_active_experts,
        "rope.freq_base": config.rope.theta,
        "rope.scaling.factor": config.rope.factor,
        "rope.scaling.original_context_length": config.rope.original_context,
    }
    if architecture == "gpt-oss":
        fields |= {"rope.scaling.type": "yarn", "expert_feed_forward_length": config.expert_size}
        fields |= {"rope.scaling.yarn_beta_fast": config.rope.beta_fast}
        fields |= {"rope.scaling.yarn_beta_slow": config.rope.beta_slow}
    table: dict[str, object] = {"general.architecture": architecture, "general.name": "Tiny"}
    table |= {f"{architecture}.{name}": value for name, value in fields.items()}
    return table | {"tokenizer.ggml.tokens": [f"t{i}" for i in range(config.vocabulary_size)]}


_PARTS = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.out.weight": "attn_output.weight",
    "attention.out.bias": "attn_output.bias",
    "attention.sinks": "attn_sinks.weight",
    "mlp_norm.weight": "post_attention_norm.weight",
    "router.weight": "ffn_gate_inp.weight",
    "router.bias": "ffn_gate_inp.bias",
    "experts.down.bias": "ffn_down_exps.bias",
    **{f"attention.{part}.{kind}": f"attn_{part}.{kind}" for part in "qkv" for kind in ("weight", "bias")},
}
_OUTER = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "unembedding.weight": "output.weight",
}


def converted(config: ModelConfig, seed: int = 0, dense: str = "BF16", mxfp4: str = "MXFP4") -> Tensors:
    """The tensors of `make_tiny_checkpoint` with this seed, as llama.cpp's converter names and stores them.

    dense: the type of matrices; vectors and the router are F32.
    """
    table = dict(random_tensors(config, seed))
    out: Tensors = []
    for name, array in table.items():
        if name in _OUTER:
            out.append(_dense(_OUTER[name], array, dense))
            continue
        _, layer, part = name.split(".", 2)
        block = f"blk.{layer}."
        if part in _PARTS:
            out.append(_dense(block + _PARTS[part], array, "F32" if part.startswith("router") else dense))
        elif part == "experts.gate_up.bias":
            out += [_dense(f"{block}ffn_{half}_exps.bias", array[:, row::2], "F32") for row, half in _HALVES]
        elif part.endswith(".blocks"):
            scales = table[name.replace("blocks", "scales")]
            rows = join_mxfp4(array, scales, is_split=mxfp4 == "MXFP4")
            if "gate_up" in part:
                out += [(f"{block}ffn_{half}_exps.weight", mxfp4, rows[:, row::2]) for row, half in _HALVES]
            else:
                out.append((f"{block}ffn_down_exps.weight", mxfp4, rows))
    return out


_HALVES = ((0, "gate"), (1, "up"))


def fused(config: ModelConfig, seed: int = 0) -> Tensors:
    """The same as Ollama's converter stores OpenAI's files: fused, nibbles left alone, all else bf16."""
    table = dict(random_tensors(config, seed))
    names = {**_PARTS, "attention.out.weight": "attn_out.weight", "attention.out.bias": "attn_out.bias"}
    names |= {"attention.sinks": "attn_sinks", "mlp_norm.weight": "ffn_norm.weight"}
    out: Tensors = [(_OUTER[name], "BF16", table[name]) for name in _OUTER]
    for layer in range(config.num_layers):
        ours, block = f"layers.{layer}.", f"blk.{layer}."
        for kind in ("weight", "bias"):
            rows = np.concatenate([table[f"{ours}attention.{part}.{kind}"] for part in "qkv"])
            out.append((f"{block}attn_qkv.{kind}", "BF16", rows))
        for part, stored in names.items():
            if not part.startswith(("attention.q", "attention.k", "attention.v")):
                out.append((block + stored, "BF16", table[ours + part]))
        for half in ("gate_up", "down"):
            parts = [table[f"{ours}experts.{half}.{kind}"] for kind in ("blocks", "scales")]
            out.append((f"{block}ffn_{half}_exps.weight", "MXFP4_PAIRS", join_mxfp4(*parts, is_split=False)))
        out.append((f"{block}ffn_gate_up_exps.bias", "BF16", table[f"{ours}experts.gate_up.bias"]))
    return out


def _dense(name: str, bits: npt.NDArray[Any], kind: str) -> tuple[str, str, npt.NDArray[Any]]:
    values = decode_bfloat16(bits)
    if values.ndim == 1 or kind == "F32":
        return name, "F32", values
    if kind == "Q8_0":
        return name, kind, encode_q8(values)
    return name, kind, values.astype(np.float16) if kind == "F16" else bits


def write_gguf(path: Path, metadata: Mapping[str, object], tensors: Iterable[Any]) -> Path:
    """Write a whole file and return its path."""
    path.write_bytes(gguf_bytes(metadata, list(tensors)))
    return path
