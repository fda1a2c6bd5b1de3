"""The training loop: samples in, a trained model out, with states from which a run goes on exactly.

    samples, report = read_data("facts.jsonl", DataSettings())
    model = TorchModel.from_checkpoint("gpt-oss-20b", torch.bfloat16)
    lora = attach_lora(model, LoraSettings(rank=8), seed=0)
    result = train(model, samples, FinetuneSettings(epochs=3), "out", lora=lora)
    lora.save("out", "gpt-oss-20b")

A step's mean loss is over all its loss tokens, however they are spread over batches. There is no dropout;
batches and rates follow from the seed and the step's number, so a state needs nothing but weights, the
optimizer's tensors and that number.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harmonium.errors import ConfigError, TrainingError
from harmonium.finetune.compact import CompactModel
from harmonium.finetune.data import Sample
from harmonium.finetune.drawn import DrawnRows
from harmonium.finetune.interrupt import Interrupts
from harmonium.finetune.loss_log import LossLog, StepRow
from harmonium.finetune.optimizer import Optimizer, rate_share
from harmonium.finetune.packing import DrawnBatches, EpochBatches, PackedBatch, SampleSource, packed_batches
from harmonium.finetune.processes import World
from harmonium.finetune.rows import RowBatch
from harmonium.finetune.settings import FinetuneSettings
from harmonium.finetune.state import RunFolder, RunState
from harmonium.model.torch import TorchModel
from harmonium.model.torch_experts import Experts
from harmonium.model.torch_loss import cross_entropy, load_balancing_loss

Watch = Callable[[StepRow, int], None]
"""Called after each step with what it was and the number of all steps."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """num_steps: that were made, those before a resume included. loss: of the last one. best_step: after how
    many steps the weights were taken that are in the model now. best_validation: None without validation.
    """

    num_steps: int
    loss: float
    best_step: int
    best_validation: float | None
    stopped_early: bool


Batch = PackedBatch | RowBatch
Source = Sequence[Sample] | SampleSource | DrawnRows


def train(
    model: TorchModel | CompactModel,
    samples: Source,
    settings: FinetuneSettings,
    out_dir: str | Path,
    *,
    lora: Any = None,
    validation: Sequence[Sample] = (),
    watch: Watch | None = None,
    world: World | None = None,
) -> TrainResult:
    """Train the model in place; afterwards it has the weights of the best validation, or the last ones.

    samples: all of them, or a function that gives those of a step (then max_steps says how many there are),
    or rows that a program draws, for a CompactModel. world: the processes that share the run; one writes.
    lora: from `attach_lora`: its parameters are trained; None: all of the model's. out_dir: gets loss.csv and
    the states, from which settings.resume goes on. Of the settings, those about data, model and adapter are
    not looked at. Nothing is exported.

    Raises ConfigError for settings that do not fit the data or the states, TrainingError when the loss is no
    number, KeyboardInterrupt after a Ctrl-C, when a state has been saved.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    world = world or World()
    run = _Run(model, samples, settings, Path(out_dir), lora, validation, world)
    run.resume()
    with Interrupts() as interrupts:
        while run.step < run.num_steps:
            row = run.advance()
            if watch is not None:
                watch(row, run.num_steps)
            # The first process's word: signals and validations are its own.
            own = (interrupts.is_asked, run.is_stale) if world.is_first else (0, 0)
            is_asked, is_stale = map(bool, world.sums(own))
            if world.is_first and (is_asked or run.step % settings.save_every == 0):
                run.save()
            if is_asked:
                raise KeyboardInterrupt
            if is_stale:
                break
    return run.finish()


class _Run:
    """A run as it stands: `step` steps are done."""

    def __init__(
        self,
        model: TorchModel | CompactModel,
        samples: Source,
        settings: FinetuneSettings,
        out: Path,
        lora: Any,
        validation: Sequence[Sample],
        world: World,
    ) -> None:
        self.model, self.settings, self.world = model, settings, world
        plain = model.weights if isinstance(model, CompactModel) else model
        plain.recomputes = settings.gradient_checkpointing
        self.named: list[tuple[str, nn.Parameter]] = (
            list(model.named_parameters()) if lora is None else lora.named_parameters()
        )
        self.rounds_experts = lora is None and plain.experts == "float" and settings.export == "mxfp4"
        self.batches = _batches(samples, settings, validation)
        self.num_steps = min(self.batches.num_steps, settings.max_steps or self.batches.num_steps)
        self.validation: Sequence[Batch] = (
            samples.validation()
            if isinstance(samples, DrawnRows)
            else packed_batches(validation, batch_tokens(settings, samples, validation))
        )
        self.optimizer = Optimizer(self.named, settings, world)
        self.facts: dict[str, Any] = {
            "settings": settings.of_the_run(),
            "data": _fingerprint(samples) + _fingerprint(validation),
            "num_steps": self.num_steps,
        }
        self.step, self.loss = 0, math.nan
        self.best_step, self.best_loss, self.num_stale = 0, math.inf, 0
        self.folder, self.log = RunFolder(out), LossLog(out / "loss.csv")

    @property
    def is_stale(self) -> bool:
        """Whether early stopping asks for the end."""
        patience = self.settings.early_stopping
        return patience is not None and self.num_stale >= patience

    def resume(self) -> None:
        """Go on from the last state, where the settings ask for it and there is one."""
        state = self.folder.last() if self.settings.resume else None
        if state is None:
            if self.world.is_first:
                self.log.begin()
            return
        _refuse_other(state.facts, self.facts, self.folder.path)
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(state.tensors[f"weights.{name}"])
        self.optimizer.load(_under(state.tensors, "optimizer."))
        torch.set_rng_state(state.tensors["generator"])
        self.step, self.loss = state.step, state.facts["loss"]
        best = state.facts["best"]
        self.best_step, self.num_stale = best["step"], best["num_stale"]
        self.best_loss = math.inf if best["loss"] is None else best["loss"]
        if self.world.is_first:
            self.log.go_on(self.step)

    def advance(self) -> StepRow:
        """One step, with the validation that is due after it."""
        began = time.monotonic()
        self._set_rounding(self.step >= (1 - self.settings.quantize_last) * self.num_steps)
        batches = self.batches.batches(self.step, self.world.rank, self.world.size)
        loss, balance = self._gradients(batches)
        norm = self._clipped_norm()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss:g} and its gradient's norm {norm:g} (learning rate "
                f"{self.settings.learning_rate:g}); the weights before it are in {self._saved()}. A smaller "
                "--lr or --clip may help"
            )
        share = rate_share(self.step, self.num_steps, self.settings)
        self.optimizer.step(share)
        self.step, self.loss = self.step + 1, loss
        validation = self._validate() if self.world.is_first else None
        counts = self._counts(batches)
        row = StepRow(
            step=self.step,
            epoch=self.batches.epoch_of(self.step - 1) + 1,
            loss=loss,
            validation_loss=validation,
            balance=balance,
            learning_rate=share * self.settings.learning_rate,
            gradient_norm=norm,
            num_tokens=counts[0],
            num_loss_tokens=counts[1],
            seconds=time.monotonic() - began,
        )
        if self.world.is_first:
            self.log.add(row)
        return row

    def save(self) -> None:
        """Write a state."""
        self.folder.save(RunState(self.step, self._tensors(), self._all_facts()))

    def finish(self) -> TrainResult:
        """Take the best weights, where there was a validation."""
        self._set_rounding(False)
        if self.validation and self.best_step != self.step and self.world.is_first:
            best = _under(self.folder.best(self.best_step), "weights.")
            with torch.no_grad():
                for name, parameter in self.named:
                    parameter.copy_(best[name])
        has_best = bool(self.validation)
        return TrainResult(
            self.step,
            self.loss,
            self.best_step if has_best else self.step,
            self.best_loss if has_best else None,
            self.step < self.num_steps,
        )

    def _counts(self, batches: Sequence[Batch]) -> tuple[int, int]:
        """(tokens of the step, those with a loss), of all processes."""
        own = [sum(batch.num_tokens for batch in batches), sum(len(batch.row_R) for batch in batches)]
        tokens, loss_tokens = self.world.sums(own)
        return int(tokens), int(loss_tokens)

    def _gradients(self, batches: Sequence[Batch]) -> tuple[float, float | None]:
        """(mean loss of the step, the experts' balance); the gradients are in the parameters."""
        total, num_batches = self.world.sums([sum(batch.weight for batch in batches), len(batches)])
        loss_sum = balance_sum = 0.0
        for batch in batches:
            loss, balance = batch_loss(self.model, batch, bool(self.settings.balance_weight))
            loss = loss / total
            loss_sum += float(loss.detach())
            if balance is not None:
                balance = balance / num_batches
                balance_sum += float(balance.detach())
                loss = loss + self.settings.balance_weight * balance
            loss.backward()  # type: ignore[no-untyped-call]
        self.world.sum_gradients([parameter for _, parameter in self.named])
        loss_sum, balance_sum = self.world.sums([loss_sum, balance_sum])
        return loss_sum, balance_sum if self.settings.balance_weight else None

    def _clipped_norm(self) -> float:
        """The gradient's norm before clipping. Muon's directions do not depend on it."""
        parameters = [parameter for _, parameter in self.named]
        return float(nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf))

    def _validate(self) -> float | None:
        every = self.settings.validate_every
        is_due = self.step % every == 0 if every else self.batches.ends_epoch(self.step - 1)
        if not self.validation or not (is_due or self.step == self.num_steps):
            return None
        self._set_rounding(True)
        loss = mean_loss(self.model, self.validation)
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.num_stale = self.step, loss, 0
            weights = {f"weights.{name}": parameter for name, parameter in self.named}
            self.folder.save_best(RunState(self.step, weights, {"validation_loss": loss}))
        else:
            self.num_stale += 1
        return loss

    def _set_rounding(self, is_on: bool) -> None:
        """Use the experts as they will be exported, or as they are."""
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.fakes_mxfp4 = is_on and self.rounds_experts

    def _tensors(self) -> dict[str, Tensor]:
        table: dict[str, Tensor] = {f"weights.{name}": parameter for name, parameter in self.named}
        table |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}
        table["generator"] = torch.get_rng_state()
        return table

    def _all_facts(self) -> dict[str, Any]:
        best = {
            "step": self.best_step,
            "loss": self.best_loss if math.isfinite(self.best_loss) else None,
            "num_stale": self.num_stale,
        }
        return {**self.facts, "loss": self.loss, "best": best}

    def _saved(self) -> str:
        state = self.folder.last()
        return "no saved state" if state is None else f"the state after step {state.step}"


def batch_loss(
    model: TorchModel | CompactModel, batch: Batch, with_balance: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(sum of the weighted losses of a batch, the experts' balance where it is asked for: 1 when even)."""
    if isinstance(model, CompactModel):
        assert isinstance(batch, RowBatch), "a compact model is trained on rows"
        loss, balance, _ = model.loss(batch)
        return loss, balance if with_balance else None
    assert isinstance(batch, PackedBatch), "a whole model is trained on packed samples"
    device = model.lm_head.weight.device
    hidden_TD, scores = model.hidden_states(torch.from_numpy(batch.token_id_T).to(device), batch.start_S)
    hidden_RD = hidden_TD.index_select(0, torch.from_numpy(batch.row_R).to(device))
    target_R = torch.from_numpy(batch.target_R).to(device)
    weight_R = torch.from_numpy(batch.weight_R).to(device)
    loss = cross_entropy(hidden_RD, model.lm_head.weight, target_R, weight_R)
    if not with_balance:
        return loss, None
    num_active = model.config.num_active_experts
    return loss, load_balancing_loss(scores, num_active) / num_active


def mean_loss(model: TorchModel | CompactModel, batches: Sequence[Batch]) -> float:
    """The mean loss over all loss tokens of the batches, as the model stands; no gradients."""
    with torch.no_grad():
        total = sum(float(batch_loss(model, batch)[0]) for batch in batches)
    return total / sum(batch.weight for batch in batches)


def batch_tokens(settings: FinetuneSettings, *groups: Sequence[Sample] | SampleSource) -> int:
    """Rows of a batch: as asked, or as many as the longest sample has, at least 512."""
    if settings.batch_tokens is not None:
        return settings.batch_tokens
    known = [group for group in groups if not callable(group)]
    if len(known) < len(groups):
        return settings.max_tokens
    return max(512, *(len(sample.token_id_T) for group in known for sample in group))


def _batches(
    samples: Source, settings: FinetuneSettings, validation: Sequence[Sample]
) -> EpochBatches | DrawnBatches | DrawnRows:
    if isinstance(samples, DrawnRows):
        return samples
    size = batch_tokens(settings, samples, validation)
    if callable(samples):
        if settings.max_steps is None:
            raise ConfigError(
                "max_steps is None; samples that are made step by step need the number of steps"
            )
        return DrawnBatches(samples, size, settings.max_steps)
    if not samples:
        raise ConfigError("there are no samples to train on")
    return EpochBatches(samples, size, settings.accumulate, settings.epochs, settings.seed)


def _fingerprint(samples: Source) -> str:
    if callable(samples) or isinstance(samples, DrawnRows):
        return "drawn"
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample.token_id_T).to_bytes(4, "little"))
        digest.update(sample.token_id_T.tobytes() + sample.weight_T.tobytes())
    return digest.hexdigest()


def _refuse_other(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    for key in sorted(set(saved["settings"]) | set(now["settings"])):
        before, after = saved["settings"].get(key), now["settings"].get(key)
        if before != after:
            raise ConfigError(
                f"{key} is {after!r}, and the run in {folder} has {before!r}; expected the same"
            )
    for key, what in (("data", "the data"), ("num_steps", "the number of steps")):
        if saved[key] != now[key]:
            raise ConfigError(f"{what} differs from that of the run in {folder}; expected the same")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
