"""Write a random checkpoint in the shapes of gpt-oss-120b, whole or a slice of some layers.

    python benchmarks/random_slice.py FOLDER [--layers 6] [--experts 128]

A layer has 1.7 GB. A slice has its share of the vocabulary too, so that the unembedding weighs in a step what
it weighs in the whole model. Random routers choose experts evenly: the worst case for a cache of experts.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import encode_bfloat16
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.names import canonical_tensors, stored_name
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.checkpoint.shards import CONFIG_NAME, INDEX_NAME
from harmonium.testing import huggingface_config, tiny_config

NUM_LAYERS = 36
VOCABULARY_SIZE = 201_088


def main() -> None:
    parser = argparse.ArgumentParser(description="A random checkpoint in the shapes of gpt-oss-120b")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    config = slice_config(options.layers, options.experts)
    options.folder.mkdir(parents=True)
    rng = np.random.default_rng(options.seed)
    weight_map: dict[str, str] = {}
    tensors = list(canonical_tensors(config, "mxfp4"))
    for shard in range(config.num_layers + 1):
        name = f"model-{shard + 1:05d}-of-{config.num_layers + 1:05d}.safetensors"
        prefix = f"layers.{shard}."
        listed = [
            (stored_name(tensor, "huggingface"), dtype, random_tensor(rng, tensor, shape))
            for tensor, dtype, shape in tensors
            if tensor.startswith(prefix) or (shard == config.num_layers and not tensor.startswith("layers."))
        ]
        write_safetensors(options.folder / name, listed)
        let_go(options.folder / name)
        weight_map.update((stored, name) for stored, _, _ in listed)
        print(f"{name}: {sum(array.nbytes for _, _, array in listed) / 1e9:.2f} GB", flush=True)
    (options.folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    table = huggingface_config(config, "mxfp4", "rope_scaling", tied=False)
    (options.folder / CONFIG_NAME).write_text(json.dumps(table, indent=1), encoding="utf-8")


def slice_config(num_layers: int, num_experts: int) -> ModelConfig:
    """gpt-oss-120b with so many layers, and its vocabulary cut in proportion."""
    config = tiny_config(
        num_layers=num_layers,
        hidden_size=2880,
        expert_size=2880,
        num_heads=64,
        num_kv_heads=8,
        head_size=64,
        num_experts=num_experts,
        num_active_experts=4,
        window=128,
    )
    return replace(config, vocabulary_size=VOCABULARY_SIZE * min(num_layers, NUM_LAYERS) // NUM_LAYERS)


def random_tensor(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Bits in the file's dtype; sizes of values as tests of speed need them: finite, and of order 1."""
    if name.endswith(".blocks"):
        return rng.integers(0, 256, shape, np.uint8)
    if name.endswith(".scales"):
        return rng.integers(117, 121, shape, np.uint8)
    mean, deviation = 0.0, 1 / np.sqrt(shape[-1])
    if name.endswith("norm.weight"):
        mean, deviation = 1.0, 0.05
    elif name.endswith((".bias", ".sinks")):
        deviation = 0.1
    elif name == "embedding.weight":
        deviation = 1.0
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(deviation)
    return encode_bfloat16(values + np.float32(mean))


def let_go(file: Path) -> None:
    """To the disk, and out of the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    main()
