"""A whole run from its settings: data, model, training, and an adapter or a checkpoint at the end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from harmonium.checkpoint import ModelConfig, open_checkpoint
from harmonium.checkpoint.config_json import read_config
from harmonium.checkpoint.names import canonical_tensors
from harmonium.config import probe_hardware
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.finetune.data import DataReport, DataSettings, Sample, read_data
from harmonium.finetune.export import export_checkpoint
from harmonium.finetune.lora import Lora, LoraSettings, attach_lora, count_parameters, load_lora
from harmonium.finetune.loss_log import LossLog, StepRow, plot, step_progress, tensorboard_writer
from harmonium.finetune.packing import packed_batches, split
from harmonium.finetune.settings import FinetuneSettings
from harmonium.finetune.state import TRAINING, RunFolder
from harmonium.finetune.train import TrainResult, batch_tokens, mean_loss, train
from harmonium.model.torch import TorchModel

SUMMARY_NAME = "finetune.json"
"""Says what a finished run was; where it is, there is nothing to go on with."""

BYTES_OF_FULL = 16
"""Of a weight in full training: itself, its gradient, AdamW's two averages, float32 each."""

LARGE_BYTES = 2 << 30
"""Of a checkpoint's dense weights in float32: above it LoRA computes in bfloat16."""


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """out: the folder. validation_loss: of what was written, read from the disk again; None without
    validation. notes: what the user should know, a line each.
    """

    out: Path
    training: TrainResult
    data: DataReport
    num_trained: int
    validation_loss: float | None
    notes: tuple[str, ...]


def finetune(settings: FinetuneSettings, say: Any = None) -> FinetuneResult:
    """Train as the settings say and write the adapter, or the checkpoint, to settings.out.

    say: called with lines for the user while it runs. Raises ConfigError for what cannot be used,
    MemoryPlanError for full training of a model that is too large, and what `train` raises.
    """
    say = say or (lambda line: None)
    out = _checked_out(settings)
    samples, held, report = _read_samples(settings)
    say(report.text())
    model, lora = _model(settings)
    named = lora.parameters() if lora is not None else list(model.parameters())
    num_trained = count_parameters(named)
    held_text = f", {len(held):,} held out" if held else ""
    say(f"training {num_trained:,} numbers on {len(samples):,} samples{held_text}")
    out.mkdir(parents=True, exist_ok=True)
    result = _train(model, lora, samples, held, settings, out)
    _write(model, lora, settings, out)
    validation = _written_loss(settings, out, held, samples) if held else None
    notes = [note for note in (plot(LossLog(out / "loss.csv"), out / "loss.png"),) if note]
    summary = {
        "settings": {**settings.of_the_run(), "model": settings.model, "data": settings.data},
        "training": asdict(result),
        "trained_numbers": num_trained,
        "validation_loss": validation,
    }
    (out / SUMMARY_NAME).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    RunFolder(out).remove()
    return FinetuneResult(out, result, report, num_trained, validation, tuple(notes))


def _train(
    model: TorchModel,
    lora: Lora | None,
    samples: Sequence[Sample],
    held: Sequence[Sample],
    settings: FinetuneSettings,
    out: Path,
) -> TrainResult:
    events = tensorboard_writer(out / "events") if settings.tensorboard else None
    with step_progress() as show:

        def watch(row: StepRow, total: int) -> None:
            show(row, total)
            if events is not None:
                events(row)

        return train(model, samples, settings, out, lora=lora, validation=held, watch=watch)


def _checked_out(settings: FinetuneSettings) -> Path:
    for key in ("data", "out"):
        if getattr(settings, key) is None:
            raise ConfigError(f"{key} is missing; expected --{key} or the key in the --config file")
    if settings.model is None and settings.from_scratch is None:
        raise ConfigError("the model is missing; expected MODEL, or --from-scratch CONFIG.json")
    out = Path(str(settings.out)).expanduser()
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder")
    if (out / SUMMARY_NAME).exists():
        raise ConfigError(f"{out}: the run in it is finished; expected a new or an empty folder")
    if not settings.resume and out.is_dir() and any(out.iterdir()):
        hint = " (--resume goes on with the run in it)" if (out / TRAINING).is_dir() else ""
        raise ConfigError(f"{out}: exists and has files; expected a new or an empty folder{hint}")
    return out


def data_settings(settings: FinetuneSettings) -> DataSettings:
    """What of the settings concerns the reading of data."""
    return DataSettings(
        settings.max_tokens, not settings.no_analysis_loss, settings.effort, settings.current_date
    )


def _read_samples(settings: FinetuneSettings) -> tuple[list[Sample], list[Sample], DataReport]:
    samples, report = read_data(Path(str(settings.data)).expanduser(), data_settings(settings))
    if isinstance(settings.validation, float):
        return *split(samples, settings.validation, settings.seed), report
    if settings.validation is not None:
        return samples, read_data(Path(settings.validation).expanduser(), data_settings(settings))[0], report
    return samples, [], report


def _model(settings: FinetuneSettings) -> tuple[TorchModel, Lora | None]:
    if settings.from_scratch is not None:
        config = read_config(Path(settings.from_scratch).expanduser()).model
        _refuse_large(config)
        return TorchModel.from_config(config, settings.seed, _dtype(settings, config)), None
    with open_checkpoint(Path(str(settings.model)).expanduser()) as opened:
        dtype = _dtype(settings, opened.config)
        if settings.method == "full":
            _refuse_large(opened.config)
            return TorchModel.from_checkpoint(opened, dtype, "float"), None
        model = TorchModel.from_checkpoint(opened, dtype)
    adapter = LoraSettings(settings.rank, settings.lora_alpha, settings.targets, settings.shares_a)  # type: ignore[arg-type]
    return model, attach_lora(model, adapter, settings.seed)


def _dtype(settings: FinetuneSettings, config: ModelConfig) -> torch.dtype:
    if settings.dtype is not None:
        return torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
    is_large = settings.method == "lora" and 4 * _num_weights(config, with_experts=False) > LARGE_BYTES
    return torch.bfloat16 if is_large else torch.float32


def _num_weights(config: ModelConfig, with_experts: bool = True) -> int:
    tensors = canonical_tensors(config, "bf16")
    sizes = [(name, int(torch.Size(shape).numel())) for name, _, shape in tensors]
    return sum(size for name, size in sizes if with_experts or ".experts." not in name)


def _refuse_large(config: ModelConfig) -> None:
    needed, there = BYTES_OF_FULL * _num_weights(config), probe_hardware(()).memory_total_bytes
    if needed > there:
        raise MemoryPlanError(
            f"full training of {_num_weights(config):,} weights needs {needed / 1e9:.1f} GB, and there are "
            f"{there / 1e9:.1f} GB; expected --method lora, or a smaller model"
        )


def _write(model: TorchModel, lora: Lora | None, settings: FinetuneSettings, out: Path) -> None:
    if lora is not None:
        lora.save(out, str(settings.model))
        return
    source = None if settings.model is None else Path(settings.model).expanduser()
    export_checkpoint(model, out, settings.export, source)  # type: ignore[arg-type]


def _written_loss(
    settings: FinetuneSettings, out: Path, held: Sequence[Sample], samples: Sequence[Sample]
) -> float:
    """The validation's loss of what is on the disk now."""
    batches = packed_batches(held, batch_tokens(settings, samples, held))
    if settings.method == "full":
        return mean_loss(TorchModel.from_checkpoint(out), batches)
    with open_checkpoint(Path(str(settings.model)).expanduser()) as opened:
        model = TorchModel.from_checkpoint(opened, _dtype(settings, opened.config))
    load_lora(model, out)
    return mean_loss(model, batches)
