"""Tiny random checkpoints in the true layouts: for tests, and to try the commands with nothing downloaded.

The sizes differ pairwise (the released models have D = F and H / G = G, so swapped axes would go unseen).
The same seed gives the same model in every layout and format: its bf16 experts are decoded from its MXFP4
experts, so that logits can be compared across them.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import encode_bfloat16
from harmonium.checkpoint.config_json import Layout
from harmonium.checkpoint.model_config import ModelConfig, RopeConfig
from harmonium.checkpoint.mxfp4 import decode_mxfp4, encode_mxfp4
from harmonium.checkpoint.names import ExpertFormat, canonical_tensors, stored_name, tensor_sources
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.checkpoint.shards import CONFIG_NAME, INDEX_NAME
from harmonium.config import cache_folder
from harmonium.errors import ConfigError

RopeSpelling = Literal["rope_scaling", "rope_parameters"]

RECIPE_VERSION = 1
"""Raised whenever the same seed gives another model: the cached checkpoint carries it in its name."""

_Stored = tuple[str, str, npt.NDArray[Any]]
"""Stored name, dtype, array."""


def tiny_config(
    *,
    vocabulary_size: int = 201_088,
    num_layers: int = 6,
    hidden_size: int = 96,
    expert_size: int = 64,
    num_heads: int = 12,
    num_kv_heads: int = 4,
    head_size: int = 16,
    num_experts: int = 5,
    num_active_experts: int = 2,
    window: int = 8,
) -> ModelConfig:
    """The shape of a tiny model; RoPE, limits and the order of layer kinds are the released models'."""
    rope = RopeConfig(150_000.0, 32.0, 32.0, 1.0, original_context=4096, truncate=False)
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        expert_size=expert_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        num_experts=num_experts,
        num_active_experts=num_active_experts,
        vocabulary_size=vocabulary_size,
        window=window,
        max_context=131_072,
        layer_kinds=tuple("full" if layer % 2 else "window" for layer in range(num_layers)),
        rope=rope,
        rms_norm_eps=1e-5,
        swiglu_limit=7.0,
    )


def make_tiny_checkpoint(
    folder: str | Path,
    *,
    layout: Layout = "huggingface",
    experts: ExpertFormat = "mxfp4",
    seed: int = 0,
    vocabulary_size: int = 201_088,
    rope: RopeSpelling = "rope_scaling",
    num_shards: int = 1,
    tied: bool = False,
    **sizes: int,
) -> Path:
    """Write a random model and return its folder.

    folder: made by this call (an empty one may exist); it appears whole or not at all. The real vocabulary
    takes 77 MB, so tests that need no text give a small one. experts: "bf16" exists in the Hugging Face
    layout only. rope: which spelling config.json uses. num_shards: more than one writes an index. tied: the
    unembedding is the embedding and is left out. sizes: as for `tiny_config`.

    Raises ConfigError when the folder has files in it or the options do not go together.
    """
    folder = Path(folder)
    if layout == "original" and (experts == "bf16" or tied):
        raise ConfigError(
            "the original layout has no bf16 experts and no tied unembedding; expected 'huggingface'"
        )
    if num_shards < 1:
        raise ConfigError(f"num_shards is {num_shards}; expected at least 1")
    config = tiny_config(vocabulary_size=vocabulary_size, **sizes)
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
        table = (
            original_config(config)
            if layout == "original"
            else huggingface_config(config, experts, rope, tied)
        )
        (temporary / CONFIG_NAME).write_text(json.dumps(table, indent=2), encoding="utf-8")
        _write_weights(temporary, _stored_tensors(config, layout, experts, seed, tied), num_shards)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error})") from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def tiny_checkpoint_path() -> Path:
    """A tiny checkpoint with the real vocabulary in the user's cache, made when it is not there yet (77 MB).

    Raises ConfigError when the cache cannot be written.
    """
    folder = cache_folder() / f"tiny-{RECIPE_VERSION}"
    if not (folder / CONFIG_NAME).is_file():
        try:
            make_tiny_checkpoint(folder)
        except ConfigError:
            # Another process may have been faster; its folder is whole.
            if not (folder / CONFIG_NAME).is_file():
                raise
    return folder


def random_tensors(config: ModelConfig, seed: int) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """(canonical name, bits) of every tensor of a model with MXFP4 experts; bf16 as uint16.

    Each tensor has a generator of its own, so that its numbers depend on nothing but seed, name and shape.
    """
    scales: dict[str, npt.NDArray[np.uint8]] = {}
    for name, _, shape in canonical_tensors(config, "mxfp4"):
        if name.endswith(".scales"):
            yield name, scales.pop(name)
            continue
        is_packed = name.endswith(".blocks")
        full = (*shape[:-2], shape[-2] * 32) if is_packed else shape
        mean, deviation = _distribution(name, full[-1])
        values = _bell(seed, name, full) * np.float32(deviation) + np.float32(mean)
        if is_packed:
            blocks, scales[name.removesuffix("blocks") + "scales"] = encode_mxfp4(values)
            yield name, blocks
        else:
            yield name, encode_bfloat16(values)


def _distribution(name: str, num_inputs: int) -> tuple[float, float]:
    """(mean, standard deviation) that keep activations of order 1 and logits of order 1 to 10.

    Biases and sinks are large enough to be missed, and gate_up reaches the SwiGLU's clamp at times.
    """
    if name.endswith("norm.weight"):
        return 1.0, 0.2
    if name.endswith((".bias", ".sinks")):
        return 0.0, 0.5
    if name == "embedding.weight":
        return 0.0, 1.0
    gains = {"unembedding": 2.5, "router": 1.5, "gate_up": 2.5, "down": 0.3}
    gain = next((gain for part, gain in gains.items() if part in name), 1.0)
    return 0.0, float(gain / np.sqrt(num_inputs))


def _bell(seed: int, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Bell-shaped numbers of mean 0 and deviation 1, within 3.5 of 0: sums of four uniform ones.

    Not Generator.normal: its stream may change with NumPy's version, and golden files are made from these
    numbers. The raw stream of a bit generator is promised to stay.
    """
    bits = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(int(np.prod(shape)))
    total = np.asarray(bits).astype("<u8").view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
    # The variance of one uniform 16-bit number is (2 ** 32 - 1) / 12.
    deviation = np.float32(np.sqrt(4 * (2**32 - 1) / 12))
    centered: npt.NDArray[np.float32] = (total - 2 * 65535).astype(np.float32)
    values: npt.NDArray[np.float32] = centered / deviation
    return values.reshape(shape)


def _stored_tensors(
    config: ModelConfig, layout: Layout, experts: ExpertFormat, seed: int, tied: bool
) -> Iterator[_Stored]:
    """What the files of a layout hold, in the order of the computation."""
    tensors = (
        _plain_experts(random_tensors(config, seed)) if experts == "bf16" else random_tensors(config, seed)
    )
    if layout == "original":
        yield from _fused(config, tensors)
        return
    for name, array in tensors:
        if not (tied and name == "unembedding.weight"):
            yield stored_name(name, layout), "U8" if array.dtype == np.uint8 else "BF16", array


def _plain_experts(
    tensors: Iterable[tuple[str, npt.NDArray[Any]]],
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """MXFP4 experts [E, out, in] -> bf16 experts [E, in, out]. Exact: MXFP4 has one fraction bit."""
    blocks: dict[str, npt.NDArray[np.uint8]] = {}
    for name, array in tensors:
        part, _, kind = name.rpartition(".")
        if kind == "blocks":
            blocks[part] = array
        elif kind == "scales":
            values = decode_mxfp4(blocks.pop(part), array)
            yield f"{part}.weight", np.ascontiguousarray(encode_bfloat16(values).swapaxes(1, 2))
        else:
            yield name, array


def _fused(config: ModelConfig, tensors: Iterable[tuple[str, npt.NDArray[Any]]]) -> Iterator[_Stored]:
    """The original layout: canonical tensors that share a stored name become its rows."""
    table = dict(tensors)
    sources = sorted(tensor_sources(config, "original", "mxfp4"), key=lambda source: source.stored)
    for stored, parts in groupby(sources, key=lambda source: source.stored):
        listed = sorted(parts, key=lambda source: source.first_row)
        yield stored, listed[0].dtype, np.concatenate([table[source.name] for source in listed])


def _write_weights(folder: Path, tensors: Iterable[_Stored], num_shards: int) -> None:
    listed = list(tensors)
    if num_shards == 1:
        write_safetensors(folder / "model.safetensors", listed)
        return
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        name = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        # Dealt out in turn, so that parts of one layer lie in different files.
        part = listed[shard::num_shards]
        write_safetensors(folder / name, part)
        weight_map.update((stored, name) for stored, _, _ in part)
    total = sum(array.nbytes for _, _, array in listed)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def huggingface_config(
    config: ModelConfig, experts: ExpertFormat, spelling: RopeSpelling, tied: bool
) -> dict[str, object]:
    rope: dict[str, object] = {
        "rope_type": "yarn",
        "factor": config.rope.factor,
        "beta_fast": config.rope.beta_fast,
        "beta_slow": config.rope.beta_slow,
        "original_max_position_embeddings": config.rope.original_context,
        "truncate": config.rope.truncate,
    }
    kinds = {"window": "sliding_attention", "full": "full_attention"}
    table: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "hidden_act": "silu",
        "num_hidden_layers": config.num_layers,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_active_experts,
        "vocab_size": config.vocabulary_size,
        "layer_types": [kinds[kind] for kind in config.layer_kinds],
        "max_position_embeddings": config.max_context,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": tied,
        **_shared_sizes(config),
    }
    if config.vocabulary_size > 200_002:
        # Transformers refuses ids that the vocabulary does not have.
        table |= {"eos_token_id": 200_002, "pad_token_id": 199_999}
    if spelling == "rope_scaling":
        table |= {"rope_theta": config.rope.theta, "rope_scaling": rope, "torch_dtype": "bfloat16"}
    else:
        table |= {"rope_parameters": {**rope, "rope_theta": config.rope.theta}, "dtype": "bfloat16"}
    if experts == "mxfp4":
        table["quantization_config"] = {"quant_method": "mxfp4"}
    return table


def original_config(config: ModelConfig) -> dict[str, object]:
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.num_active_experts,
        "vocab_size": config.vocabulary_size,
        "initial_context_length": config.rope.original_context,
        "rope_theta": config.rope.theta,
        "rope_scaling_factor": config.rope.factor,
        "rope_ntk_alpha": config.rope.beta_slow,
        "rope_ntk_beta": config.rope.beta_fast,
        **_shared_sizes(config),
    }


def _shared_sizes(config: ModelConfig) -> Mapping[str, object]:
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.expert_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "sliding_window": config.window,
    }
