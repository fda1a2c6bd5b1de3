"""Which experts to keep? Rules for a cache of experts, replayed on routes that a model took.

    python benchmarks/expert_cache.py MODEL --text FILE... [--prompt 256] [--tokens 128] [--shares 0.125,0.25]

The model reads pieces of a text and goes on from each, greedily; what its routers chose is then replayed,
layer by layer, against caches of a share of the experts. A figure is the share of needed experts that were in
memory, of decoded tokens alone; prompts fill the caches. "best possible" knows the future (Belady's rule).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint import open_checkpoint
from harmonium.config import CACHE_BLOCK_TOKENS, EngineConfig, probe_hardware, resolve
from harmonium.harmony.vocabulary import vocabulary
from harmonium.kernels.runtime import configure, supported_isa
from harmonium.loading import find_model
from harmonium.model import native
from harmonium.model.batch import Batch, RowSampling, SamplingParams
from harmonium.model.native import NativeRunner

Use = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.int64], bool]
"""A layer, its experts, how many tokens each has, whether the step decodes."""

Value = Callable[["Cache", npt.NDArray[np.int64], int], npt.NDArray[np.float64]]
"""Of experts that are there, when a layer needs room: the least goes."""


class Cache:
    """What a rule may look at. Experts of all layers have one number: layer * E + expert."""

    def __init__(self, num_layers: int, num_experts: int, halving: float) -> None:
        self.num_layers, self.num_experts, self.halving = num_layers, num_experts, halving
        self.score = np.zeros(num_layers * num_experts)  # a decayed sum of uses, as of `last`
        self.count = np.zeros(num_layers * num_experts)
        self.last = np.zeros(num_layers * num_experts, np.int64)  # in steps of the layer
        self.when = np.zeros(num_layers * num_experts, np.int64)  # in uses of any layer
        self.clock = np.zeros(num_layers, np.int64)
        self.most = np.zeros(num_layers)
        self.now = 0

    def note(self, layer: int, items: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> None:
        self.now += 1
        self.clock[layer] += 1
        age = self.clock[layer] - self.last[items]
        self.score[items] = self.score[items] * 2.0 ** (-age * self.halving) + np.log2(1.0 + counts)
        self.most[layer] = self.most[layer] * 2.0**-self.halving + np.log2(1.0 + counts.sum())
        self.count[items] += counts
        self.last[items], self.when[items] = self.clock[layer], self.now


def last_used(cache: Cache, items: npt.NDArray[np.int64], layer: int) -> npt.NDArray[np.float64]:
    return cache.when[items].astype(np.float64)


def most_used(cache: Cache, items: npt.NDArray[np.int64], layer: int) -> npt.NDArray[np.float64]:
    return cache.count[items]


def by_layer(cache: Cache, items: npt.NDArray[np.int64], layer: int) -> npt.NDArray[np.float64]:
    """As model.expert_cache.ExpertCache does it."""
    layers = items // cache.num_experts
    age = cache.clock[layers] - cache.last[items]
    until = (layers - layer - 1) % cache.num_layers
    share = np.log2(cache.score[items] + 1e-30) - age * cache.halving - np.log2(cache.most[layers] + 1e-9)
    return np.asarray(share - 1e-6 * until)


def replay(
    uses: list[Use], shape: tuple[int, int], slots: int, value: Value, halving: float = 1 / 16
) -> float:
    """Share of needed experts that were there, of steps that decode."""
    cache, present = Cache(*shape, halving), np.zeros(shape[0] * shape[1], bool)
    hits = wanted = 0
    for layer, experts, counts, decodes in uses:
        items = layer * shape[1] + experts
        cache.note(layer, items, counts)
        is_there = present[items]
        if decodes:
            hits, wanted = hits + int(is_there.sum()), wanted + len(items)
        for item in items[~is_there]:
            if present.sum() >= slots:
                held = np.flatnonzero(present)
                # What this call uses may go only where nothing else is left, as in a long prompt.
                others = held[~np.isin(held, items)]
                held = others if len(others) else held
                present[held[np.argmin(value(cache, held, layer))]] = False
            present[item] = True
    return hits / wanted


def replay_best(uses: list[Use], shape: tuple[int, int], slots: int) -> float:
    """The same when what is needed last in future goes."""
    future: dict[int, list[int]] = {}
    for at, (layer, experts, _, _) in enumerate(uses):
        for expert in experts:
            future.setdefault(layer * shape[1] + int(expert), []).append(at)
    present: set[int] = set()
    hits = wanted = 0
    for layer, experts, _, decodes in uses:
        for expert in experts:
            item = layer * shape[1] + int(expert)
            future[item].pop(0)
            if decodes:
                hits, wanted = hits + (item in present), wanted + 1
            if item not in present and len(present) >= slots:
                present.remove(max(present, key=lambda held: future[held][0] if future[held] else 1 << 60))
            present.add(item)
    return hits / wanted


def record(runner: NativeRunner, pieces: list[npt.NDArray[np.int32]], num_tokens: int) -> list[Use]:
    """The routes of prompts and of greedy tokens after each."""
    uses: list[Use] = []
    real, at = native.router, [0, False]

    def listening(x: Any, weight: Any, bias: Any, id_TA: Any, *rest: Any) -> None:
        real(x, weight, bias, id_TA, *rest)
        experts, counts = np.unique(id_TA, return_counts=True)
        uses.append((at[0] % runner.config.num_layers, experts.astype(np.int64), counts, bool(at[1])))
        at[0] += 1

    native.router = listening  # type: ignore[attr-defined]
    for piece in pieces:
        at[1] = False
        token = step(runner, piece, 0)
        at[1] = True
        for position in range(len(piece), len(piece) + num_tokens):
            token = step(runner, np.array([token], np.int32), position)
    native.router = real  # type: ignore[attr-defined]
    return uses


def step(runner: NativeRunner, tokens: npt.NDArray[np.int32], position: int) -> int:
    end = position + len(tokens)
    blocks = np.arange(-(-end // CACHE_BLOCK_TOKENS), dtype=np.int32)[None]
    result = runner.step(
        Batch(
            token_id_T=tokens,
            position_T=np.arange(position, end, dtype=np.int32),
            query_start_S1=np.array([0, len(tokens)], np.int32),
            context_length_S=np.array([end], np.int32),
            full_block_SB=blocks,
            window_block_SB=blocks,
            # Every row gets logits, so that the last layer routes them all.
            logit_row_R=np.arange(len(tokens), dtype=np.int32),
            sampling=(None,) * (len(tokens) - 1) + (RowSampling(SamplingParams(temperature=0), 5),),
        )
    )
    token = result.tokens[-1]
    assert token is not None
    return token.token_id


def main() -> None:
    parser = argparse.ArgumentParser(description="Rules for a cache of experts on recorded routes")
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, nargs="+")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--pieces", type=int, default=8)
    parser.add_argument("--shares", default="0.125,0.25,0.5")
    options = parser.parse_args()
    resolved = resolve(EngineConfig(), probe_hardware(supported_isa()))
    configure(resolved.isa, resolved.threads)
    runner = NativeRunner(open_checkpoint(find_model(options.model)), max_batch_tokens=options.prompt)
    config = runner.config
    ids = vocabulary().encode("\n".join(path.read_text() for path in options.text))
    starts = np.linspace(0, len(ids) - options.prompt, options.pieces).astype(int)
    pieces = [np.array(ids[start : start + options.prompt], np.int32) for start in starts]
    runner.allocate_cache(*[-(-(options.prompt + options.tokens) // CACHE_BLOCK_TOKENS)] * 2)
    uses = record(runner, pieces, options.tokens)
    shape = config.num_layers, config.num_experts
    rules: list[tuple[str, Callable[[int], float]]] = [
        ("last used", lambda slots: replay(uses, shape, slots, last_used)),
        ("most used", lambda slots: replay(uses, shape, slots, most_used)),
        *(
            (
                f"by layer, halved in {steps}",
                lambda slots, steps=steps: replay(uses, shape, slots, by_layer, 1 / steps),
            )
            for steps in (4, 16, 32, 64, 256)
        ),
        ("best possible", lambda slots: replay_best(uses, shape, slots)),
    ]
    shares = [float(word) for word in options.shares.split(",")]
    print(f"{'in memory':<26}" + "".join(f"{share:>8.1%}" for share in shares))
    for name, measure in rules:
        figures = [measure(max(1, int(share * shape[0] * shape[1]))) for share in shares]
        print(f"{name:<26}" + "".join(f"{figure:>8.1%}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
