"""How much memory one training step of LoRA takes: the first layers of a checkpoint, forwards and backwards.

    python benchmarks/finetune_memory.py MODEL [--layers 2] [--tokens 4096] [--dtype float32] [--json]

Takes embedding, the first layers and the output matrix of MODEL as they lie there (weights may be random: the
memory is the same), adds LoRA to attention, experts and router, and takes one step of AdamW on one sample of
random tokens, with layers recomputed in the backward pass. Prints the peak of the resident memory as the
system counts it: libraries, copied weights, the pages of mapped experts and everything of the step.

Each number of layers needs a process of its own, since a peak never falls. Needs harmonium[torch].
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from harmonium.checkpoint import Checkpoint, open_checkpoint
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.safetensors import Advice
from harmonium.finetune.lora import TARGETS, LoraSettings, attach_lora, count_parameters
from harmonium.model.torch import TorchModel
from harmonium.model.torch_loss import cross_entropy


@dataclass(frozen=True)
class FirstLayers:
    """A checkpoint that ends after a few layers (model.reference.TensorSource)."""

    checkpoint: Checkpoint
    config: ModelConfig

    @property
    def expert_format(self) -> str:
        return self.checkpoint.expert_format

    def tensor(self, name: str) -> npt.NDArray[Any]:
        return self.checkpoint.tensor(name)

    def advise(self, name: str, advice: Advice) -> None:
        self.checkpoint.advise(name, advice)


def peak_bytes() -> int:
    """The largest resident memory of this process so far. Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(
    path: Path, layers: int, tokens: int, loss_tokens: int, dtype: torch.dtype, rank: int
) -> dict[str, float | int | str]:
    start_bytes = peak_bytes()
    with open_checkpoint(path) as checkpoint:
        whole = checkpoint.config
        config = replace(whole, num_layers=layers, layer_kinds=whole.layer_kinds[:layers])
        model = TorchModel.from_checkpoint(FirstLayers(checkpoint, config), dtype)
    lora = attach_lora(model, LoraSettings(rank, 2.0 * rank, TARGETS), seed=0)
    model.recomputes = True
    optimizer = torch.optim.AdamW(lora.parameters(), lr=1e-4)
    loaded_bytes = peak_bytes()
    rng = np.random.default_rng(0)
    ids = torch.from_numpy(rng.integers(0, config.vocabulary_size, tokens + 1))
    began = time.perf_counter()
    hidden_TD, _ = model.hidden_states(ids[:-1])
    hidden_RD, target_R = hidden_TD[-loss_tokens:], ids[-loss_tokens:]
    loss = cross_entropy(hidden_RD, model.lm_head.weight, target_R, torch.ones(loss_tokens)) / loss_tokens
    loss.backward()
    optimizer.step()
    assert all(parameter.grad is not None for parameter in lora.parameters())
    return {
        "layers": layers,
        "tokens": tokens,
        "loss_tokens": loss_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "rank": rank,
        "trained_parameters": count_parameters(lora.parameters()),
        "libraries_bytes": start_bytes,
        "loaded_bytes": loaded_bytes,
        "peak_bytes": peak_bytes(),
        "loss": loss.item(),
        "seconds": time.perf_counter() - began,
    }


def report(result: Mapping[str, float | int | str]) -> str:
    lines = []
    for name, value in result.items():
        if name.endswith("_bytes"):
            lines.append(f"{name.removesuffix('_bytes'):20} {float(value) / 1e9:8.2f} GB")
        else:
            shown = (
                f"{value:,.2f}"
                if isinstance(value, float)
                else f"{value:,}"
                if isinstance(value, int)
                else value
            )
            lines.append(f"{name:20} {shown:>8}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--loss-tokens", type=int, help="tokens that count, the last ones; default: all")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    loss_tokens = given.loss_tokens or given.tokens
    dtype = getattr(torch, given.dtype)
    result = measure(given.model, given.layers, given.tokens, loss_tokens, dtype, given.rank)
    print(json.dumps(result) if given.json else report(result))


if __name__ == "__main__":
    main()
