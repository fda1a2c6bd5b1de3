"""What int8 costs: logits with int8 dense weights and activations against those with bf16, same
checkpoint; and with an int8 cache against a bf16 one.

python benchmarks/numerics.py MODEL [--prompts 1] [--length 64] [--layers 1,2,24] [--reference 0]
    [--text FILE] [--json]

Prompts are random tokens, the same every time; with --text the file's first tokens, cut into prompts.
Figures are over all positions: relative error (root mean square difference over root mean square logits),
typical error (its median over positions), Kullback-Leibler divergence of the next token's distribution in
nats, how often the best token is the same, and how often the best token of the one is among the five best of
the other. Each depth is the model cut to its first layers: with random weights a difference grows from layer
to layer, and full depth shows that growth more than its cause.

The second row of a depth is the cache (weights bf16 in both). The third is the control: bf16 on another
instruction set, where only the order of sums differs. --reference N: N tokens through the NumPy reference in
float32 too, which is slow on a full-size model.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.config import (
    CACHE_BLOCK_TOKENS,
    EngineConfig,
    KvCache,
    Weights,
    environment_config,
    probe_hardware,
    resolve,
)
from harmonium.harmony.vocabulary import vocabulary
from harmonium.kernels.runtime import configure, supported_isa
from harmonium.model.batch import Batch
from harmonium.model.native import NativeRunner
from harmonium.model.reference import ReferenceModel

Logits = npt.NDArray[np.float32]
Prompts = npt.NDArray[np.int32]


def main() -> None:
    options = _options()
    settings: Any = environment_config()
    resolved = resolve(EngineConfig(**settings), probe_hardware(supported_isa()))
    with open_checkpoint(options.model) as checkpoint:
        config = checkpoint.config
    depths = [int(part) for part in options.layers.split(",")] if options.layers else [config.num_layers]
    prompts = _prompts(options, config.vocabulary_size)
    for depth in depths:
        for title, row in measure(options, prompts, depth, resolved.isa, resolved.threads):
            if options.json:
                print(json.dumps({"layers": depth, "isa": resolved.isa, "what": title, **row}), flush=True)
            else:
                figures = ", ".join(f"{name} {value:.5g}" for name, value in row.items())
                print(f"{depth} layers, {title}: {figures}", flush=True)


def _prompts(options: argparse.Namespace, vocabulary_size: int) -> Prompts:
    """[prompts, length] token ids."""
    if options.text is None:
        raw = np.asarray(np.random.PCG64(0).random_raw((options.prompts, options.length)))
        return (raw % np.uint64(vocabulary_size)).astype(np.int32)
    tokens = vocabulary().encode(options.text.read_text())
    num_tokens = options.prompts * options.length
    if len(tokens) < num_tokens:
        raise SystemExit(f"{options.text} has {len(tokens):,} tokens; expected {num_tokens:,}")
    return np.array(tokens[:num_tokens], np.int32).reshape(options.prompts, options.length)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What int8 costs in logits")
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--layers", default="", help="depths to cut the model to, comma-separated")
    parser.add_argument("--text", type=Path, metavar="FILE", help="prompts from a text, not random tokens")
    parser.add_argument("--reference", type=int, default=0, metavar="N")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def measure(
    options: argparse.Namespace, prompts: Prompts, depth: int, isa: str, threads: int
) -> list[tuple[str, dict[str, float]]]:
    """(title, figures) of each comparison at one depth."""
    configure(isa, threads)
    bf16 = native_logits(options.model, depth, "bf16", prompts)
    int8 = native_logits(options.model, depth, "int8", prompts)
    cache = native_logits(options.model, depth, "bf16", prompts, "int8")
    rows = [("int8 against bf16", compare(int8, bf16)), ("int8 cache against bf16", compare(cache, bf16))]
    others = [name for name in supported_isa() if name not in (isa, "scalar")]
    if others:
        configure(others[-1], threads)
        control = native_logits(options.model, depth, "bf16", prompts)
        rows.append((f"bf16 on {others[-1]} against {isa}", compare(control, bf16)))
    if options.reference:
        kept = min(options.reference, prompts.shape[1])
        with cut_checkpoint(options.model, depth) as checkpoint:
            exact = ReferenceModel(checkpoint).logits(prompts[0, :kept]).astype(np.float32)
        rows.append(("bf16 against float32", compare(bf16[:kept], exact)))
        rows.append(("int8 against float32", compare(int8[:kept], exact)))
    return rows


def cut_checkpoint(model: str, depth: int) -> Checkpoint:
    """The checkpoint as if it had only its first layers."""
    checkpoint = open_checkpoint(model)
    kinds = checkpoint.config.layer_kinds[:depth]
    checkpoint.config = replace(checkpoint.config, num_layers=depth, layer_kinds=kinds)
    return checkpoint


def native_logits(
    model: str, depth: int, weights: Weights, prompts: Prompts, kv_cache: KvCache = "bf16"
) -> Logits:
    """Logits after every token of every prompt, one below the other."""
    length = prompts.shape[1]
    num_blocks = -(-length // CACHE_BLOCK_TOKENS)
    runner = NativeRunner(cut_checkpoint(model, depth), weights, max_batch_tokens=length, kv_cache=kv_cache)
    runner.allocate_cache(num_blocks, num_blocks)
    blocks = np.arange(num_blocks, dtype=np.int32)[None]
    logits = []
    for tokens in prompts:
        batch = Batch(
            token_id_T=tokens,
            position_T=np.arange(length, dtype=np.int32),
            query_start_S1=np.array([0, length], np.int32),
            context_length_S=np.array([length], np.int32),
            full_block_SB=blocks,
            window_block_SB=blocks,
            logit_row_R=np.arange(length, dtype=np.int32),
            sampling=(None,) * length,
            wants_logits=True,
        )
        logits.append(runner.step(batch).logits_RV)
    runner.close()
    return np.concatenate([rows for rows in logits if rows is not None])


def compare(logits_RV: Logits, expected_RV: Logits) -> dict[str, float]:
    """The figures that the module's docstring names."""
    square = np.mean(np.square(expected_RV))
    row_R = np.sqrt(np.mean(np.square(logits_RV - expected_RV), axis=1) / square)
    pairs = zip(logits_RV.astype(np.float64), expected_RV.astype(np.float64), strict=True)
    divergence_R = np.array([kullback_leibler(logits_V, expected_V) for logits_V, expected_V in pairs])
    best_R = expected_RV.argmax(axis=1)
    five_R5 = np.argpartition(-logits_RV, 5, axis=1)[:, :5]
    return {
        "positions": float(len(row_R)),
        "deviation of logits": float(expected_RV.std()),
        "relative error": float(np.sqrt(np.mean(np.square(row_R)))),
        "typical error": float(np.median(row_R)),
        "largest difference": float(np.abs(logits_RV - expected_RV).max()),
        "mean divergence": float(divergence_R.mean()),
        "median divergence": float(np.median(divergence_R)),
        "same best token": float(np.mean(logits_RV.argmax(axis=1) == best_R)),
        "best among five": float(np.mean((five_R5 == best_R[:, None]).any(axis=1))),
    }


def kullback_leibler(logits_V: npt.NDArray[np.float64], expected_V: npt.NDArray[np.float64]) -> float:
    """Of the distribution after `logits` from that after `expected`, in nats."""
    log_p, log_q = (x - x.max() - np.log(np.exp(x - x.max()).sum()) for x in (expected_V, logits_V))
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


if __name__ == "__main__":
    main()
