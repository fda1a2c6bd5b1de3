"""Trained weights -> the packed file of the package: `python -m demo.export WEIGHTS.pt`."""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harmonium.checkpoint.bfloat16 import encode_bfloat16
from harmonium.checkpoint.mxfp4 import encode_mxfp4
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.demo import CONFIG_TEXT, PACKED_FILE, USED_TOKENS
from harmonium.testing import huggingface_config, tiny_config

_PARTS = {
    "n1": "input_layernorm.weight",
    "q": "self_attn.q_proj.weight",
    "qb": "self_attn.q_proj.bias",
    "k": "self_attn.k_proj.weight",
    "kb": "self_attn.k_proj.bias",
    "v": "self_attn.v_proj.weight",
    "vb": "self_attn.v_proj.bias",
    "o": "self_attn.o_proj.weight",
    "ob": "self_attn.o_proj.bias",
    "sink": "self_attn.sinks",
    "n2": "post_attention_layernorm.weight",
    "rw": "mlp.router.weight",
    "rb": "mlp.router.bias",
    "gu": "mlp.experts.gate_up_proj",
    "gub": "mlp.experts.gate_up_proj_bias",
    "dn": "mlp.experts.down_proj",
    "dnb": "mlp.experts.down_proj_bias",
}
_WHOLE = {"emb": "model.embed_tokens.weight", "head": "lm_head.weight", "nf": "model.norm.weight"}
_EXPERTS = ("gu", "dn")
_Tensor = tuple[str, str, npt.NDArray[Any]]


def tensors(weights: Mapping[str, torch.Tensor], used: list[int]) -> Iterator[_Tensor]:
    """What the packed file holds, but for the config. used: token ids after the shared class."""
    yield USED_TOKENS, "I32", np.array(used[1:], np.int32)
    for name, value in weights.items():
        array = value.detach().float().numpy()
        if name in _WHOLE:
            yield _WHOLE[name], "BF16", encode_bfloat16(array)
            continue
        _, layer, part = name.split(".")
        stored = f"model.layers.{layer}.{_PARTS[part]}"
        if part in _EXPERTS:
            blocks, scales = encode_mxfp4(array)
            yield f"{stored}_blocks", "U8", blocks
            yield f"{stored}_scales", "U8", scales
        else:
            yield stored, "BF16", encode_bfloat16(array)


def pack(
    weights: Mapping[str, torch.Tensor], used: list[int], sizes: Mapping[str, int], target: Path
) -> None:
    """Write the packed file. sizes: by dimension letter."""
    config = tiny_config(
        num_layers=sizes["L"],
        hidden_size=sizes["D"],
        expert_size=sizes["F"],
        num_heads=sizes["H"],
        num_kv_heads=sizes["G"],
        head_size=sizes["K"],
        num_experts=sizes["E"],
        num_active_experts=sizes["A"],
        window=128,
    )
    text = json.dumps(huggingface_config(config, "mxfp4", "rope_scaling", False), indent=2)
    listed = [*tensors(weights, used), (CONFIG_TEXT, "U8", np.frombuffer(text.encode(), np.uint8))]
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "compact"
        write_safetensors(plain, listed)
        target.write_bytes(lzma.compress(plain.read_bytes(), format=lzma.FORMAT_XZ, preset=9))


def main() -> None:
    saved = torch.load(sys.argv[1], weights_only=False)
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else PACKED_FILE
    pack(saved["net"], saved["used"], saved["c"], target)
    print(f"{target}: {target.stat().st_size:,} bytes, step {saved['step']}")


if __name__ == "__main__":
    main()
