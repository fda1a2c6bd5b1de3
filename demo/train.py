"""Trains the demo model: `python -m demo.train FOLDER` (docs/demo.md says with what, and how long it takes).

Weights, optimizer and step go to FOLDER/last.pt every so many steps; the same command goes on from there, and
gives what an uninterrupted run gives. Everything is drawn from --seed and the number of the step.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from demo.embedding import structured_embedding
from demo.mixture import EVEN, draw_row, shares_at, used_tokens
from demo.muon import Muon
from demo.network import Network, Sizes, row_masks
from demo.rows import Row

EMBEDDING_SCALE, HEAD_SCALE = 0.5, 0.03
BALANCE_WEIGHT = 0.01
MATRICES = ("q", "k", "v", "o", "gu", "dn")
HELD_OUT_SEED = 99


@dataclass(frozen=True)
class Plan:
    """steps: in all. quantized_from: from this step on the experts are computed with as MXFP4. rows: of each
    process. decay: the share of the steps over which the rates fall.
    """

    steps: int
    quantized_from: int
    rows: int
    row_length: int
    warmup: int
    decay: float
    muon_rate: float
    adam_rate: float
    seed: int

    def rate(self, step: int) -> float:
        falling = (self.steps - step) / (self.decay * self.steps)
        return min(1.0, (step + 1) / self.warmup) * max(0.02, min(1.0, falling))


@dataclass(frozen=True)
class Batch:
    rows: list[Row]
    token_BT: Tensor
    position_BT: Tensor
    segment_BT: Tensor
    is_target_BT: Tensor


class Trainer:
    """A network, its optimizers, where it stands. rank of world: this process among those sharing a step."""

    def __init__(self, plan: Plan, folder: Path, rank: int, world: int) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.path, self.rank, self.world = plan, folder / "last.pt", rank, world
        self.used = used_tokens()
        self._row_of = {token: row for row, token in enumerate(self.used) if row}
        self.network = Network(Sizes(V=len(self.used)))
        with torch.no_grad():
            embedding = structured_embedding(self.used, self.network.sizes.D)
            self.network.emb.copy_(embedding * EMBEDDING_SCALE)
            self.network.head.copy_(embedding * HEAD_SCALE)
        named = dict(self.network.named_parameters())
        matrices = [value for name, value in named.items() if name.rpartition(".")[2] in MATRICES]
        self._others: list[nn.Parameter] = [
            value for name, value in named.items() if name.rpartition(".")[2] not in MATRICES
        ]
        self.muon = Muon(matrices, rank, world)
        self.adam = torch.optim.AdamW(
            self._others, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-10, fused=True
        )
        self.step = 0
        if self.path.exists():
            self._resume()

    def _resume(self) -> None:
        saved = torch.load(self.path, weights_only=False)
        if saved["used"] != self.used:
            raise SystemExit(f"{self.path} was made with another generator: its tokens differ")
        self.network.load_state_dict(saved["net"])
        self.adam.load_state_dict(saved["opt"])
        self.muon.load(saved["buf"])
        self.step = saved["step"]

    def save(self) -> None:
        if self.rank:
            return
        state = {
            "net": self.network.state_dict(),
            "opt": self.adam.state_dict(),
            "buf": self.muon.momentum,
            "step": self.step,
            "used": self.used,
            "c": asdict(self.network.sizes),
        }
        temporary = self.path.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.path)

    def draw(self, random: Random, held_out: bool = False) -> Batch:
        shares = EVEN if held_out else shares_at(self.step)
        length = self.plan.row_length
        rows = [draw_row(random, length, held_out, shares=shares) for _ in range(self.plan.rows)]
        return Batch(
            rows,
            torch.tensor([[self._row_of.get(token, 0) for token in row.token_ids] for row in rows]),
            torch.tensor([row.positions for row in rows]),
            torch.tensor([row.segments for row in rows]),
            torch.tensor([row.is_target for row in rows]),
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, dict[str, list[bool]]]:
        """Mean loss of the answers' tokens, the balance loss, which samples are right to the last token."""
        masks = row_masks(batch.position_BT, batch.segment_BT)
        hidden, balance = self.network.hidden(batch.token_BT, batch.position_BT, masks)
        row, before = batch.is_target_BT[:, 1:].nonzero(as_tuple=True)
        loss, right = self.network.answer_loss(hidden[row, before], batch.token_BT[row, before + 1])
        segment = batch.segment_BT[row, before + 1]
        exact: dict[str, list[bool]] = defaultdict(list)
        for index, each in enumerate(batch.rows):
            for number, sample in enumerate(each.samples, 1):
                exact[sample.skill].append(bool(right[(row == index) & (segment == number)].all()))
        return loss.mean(), balance, exact

    def advance(self) -> tuple[float, dict[str, list[bool]]]:
        """One step; its loss, and which samples were right."""
        self.network.quantizes_experts = self.step >= self.plan.quantized_from
        random = Random(self.plan.seed * 1_000_003 + self.step * 64 + self.rank)
        loss, balance, exact = self.forward(self.draw(random))
        (loss + BALANCE_WEIGHT * balance).backward()  # type: ignore[no-untyped-call]
        if self.world > 1:
            self._share_gradients()
        nn.utils.clip_grad_norm_(self._others, 1.0)
        rate = self.plan.rate(self.step)
        for group in self.adam.param_groups:
            group["lr"] = self.plan.adam_rate * rate
        self.adam.step()
        self.muon.step(self.plan.muon_rate * rate)
        self.network.zero_grad(set_to_none=True)
        self.step += 1
        return loss.item(), exact

    def _share_gradients(self) -> None:
        gradients = [value.grad for value in self.network.parameters() if value.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    @torch.no_grad()
    def held_out(self, batches: int) -> str:
        """The share of held-out samples whose every token is the likeliest: what greedy decoding writes."""
        random = Random(HELD_OUT_SEED)
        exact: dict[str, list[bool]] = defaultdict(list)
        for _ in range(batches):
            for skill, right in self.forward(self.draw(random, held_out=True))[2].items():
                exact[skill] += right
        return _shares(exact)


def _shares(exact: dict[str, list[bool]]) -> str:
    return ", ".join(f"{skill} {sum(right) / len(right):.3f}" for skill, right in sorted(exact.items()))


def run(trainer: Trainer, log_every: int, save_every: int) -> None:
    losses: list[float] = []
    exact: dict[str, list[bool]] = defaultdict(list)
    start = time.monotonic()
    while trainer.step < trainer.plan.steps:
        loss, right = trainer.advance()
        losses.append(loss)
        for skill, each in right.items():
            exact[skill] += each
        if trainer.step % log_every == 0 and trainer.rank == 0:
            tokens = trainer.plan.rows * trainer.plan.row_length * trainer.world * len(losses)
            speed = tokens / (time.monotonic() - start)
            mean = math.fsum(losses) / len(losses)
            print(f"{trainer.step} loss {mean:.4f}, {speed:,.0f} tokens/s; {_shares(exact)}", flush=True)
            losses, exact, start = [], defaultdict(list), time.monotonic()
        if trainer.step % save_every == 0 or trainer.step == trainer.plan.steps:
            trainer.save()
            shares = trainer.held_out(3)
            if trainer.rank == 0:
                print(f"{trainer.step} held out: {shares}", flush=True)


def _arguments() -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, value in PLAN.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1, help="processes that share a step, each with --rows")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    return arguments, Plan(**{name: getattr(arguments, name) for name in PLAN})


PLAN: dict[str, Any] = {
    "steps": 4000,
    "quantized_from": 3200,
    "rows": 8,
    "row_length": 384,
    "warmup": 30,
    "decay": 0.555,
    "muon_rate": 0.01,
    "adam_rate": 2e-3,
    "seed": 0,
}


def main() -> None:
    arguments, plan = _arguments()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    if arguments.world > 1:
        meeting = f"file://{(arguments.folder / f'meeting-{os.getppid()}').resolve()}"
        dist.init_process_group("gloo", init_method=meeting, rank=arguments.rank, world_size=arguments.world)
    trainer = Trainer(plan, arguments.folder, arguments.rank, arguments.world)
    if not arguments.no_compile:
        trainer.network.compile_parts()
    run(trainer, arguments.log_every, arguments.save_every)


if __name__ == "__main__":
    main()
