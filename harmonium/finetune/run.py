"""A whole run from its settings: data, model, training, and an adapter or a checkpoint at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from harmonium.checkpoint import ModelConfig, open_checkpoint
from harmonium.checkpoint.config_json import read_config
from harmonium.checkpoint.names import canonical_tensors
from harmonium.config import probe_hardware
from harmonium.errors import ConfigError, MemoryPlanError
from harmonium.finetune.compact import CompactModel
from harmonium.finetune.data import DataReport, DataSettings, Sample, read_data
from harmonium.finetune.drawn import DrawnRows, is_drawn, load_drawn
from harmonium.finetune.export import export_checkpoint
from harmonium.finetune.lora import Lora, LoraSettings, attach_lora, count_parameters, load_lora
from harmonium.finetune.loss_log import LossLog, StepRow, plot, step_progress, tensorboard_writer
from harmonium.finetune.packing import packed_batches, split
from harmonium.finetune.processes import World, shared_run
from harmonium.finetune.rows import samples_of_rows
from harmonium.finetune.settings import FinetuneSettings
from harmonium.finetune.state import TRAINING, RunFolder
from harmonium.finetune.train import Source, TrainResult, Watch, batch_tokens, mean_loss, train
from harmonium.model.attention import Device
from harmonium.model.torch import TorchModel
from harmonium.model.torch_device import probe_case, torch_device

SUMMARY_NAME = "finetune.json"
"""Says what a finished run was; where it is, there is nothing to go on with."""

BYTES_OF_FULL = 16
"""Of a weight in full training: itself, its gradient, AdamW's two averages, float32 each."""

LARGE_BYTES = 2 << 30
"""Of a checkpoint's dense weights in float32: above it LoRA computes in bfloat16."""


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """out: the folder. data: None where a program drew it. validation_loss: of what was written, read from
    the disk again; None without validation. notes: what the user should know, a line each.
    """

    out: Path
    training: TrainResult
    data: DataReport | None
    num_trained: int
    validation_loss: float | None
    notes: tuple[str, ...]


def finetune(settings: FinetuneSettings, say: Any = None) -> FinetuneResult:
    """Train as the settings say and write the adapter, or the checkpoint, to settings.out.

    say: called with lines for the user while it runs. Raises ConfigError for what cannot be used,
    MemoryPlanError for full training of a model that is too large, and what `train` raises.
    """
    say = say or (lambda line: None)
    try:
        return _finetune(settings, say)
    except torch.OutOfMemoryError as error:
        raise MemoryPlanError(
            f"the GPU's memory is full ({str(error).split('. ')[0]}); expected less of it in use: a smaller "
            "--batch-tokens (with --accumulate) or --max-tokens, --gradient-checkpointing, or --device cpu"
        ) from None


def _finetune(settings: FinetuneSettings, say: Any) -> FinetuneResult:
    out = _checked_out(settings)
    if settings.processes > 1 and settings.threads is None:
        cores = len(probe_hardware(()).cores)
        settings = replace(settings, threads=max(1, cores // settings.processes))
    with shared_run(settings) as world:
        prepared = _prepare(settings, say)
        out.mkdir(parents=True, exist_ok=True)
        result = _train(prepared, settings, out, world)
    _write(prepared, settings, out)
    validation = _written_loss(prepared, settings, out)
    notes = [note for note in (plot(LossLog(out / "loss.csv"), out / "loss.png"),) if note]
    summary = {
        "settings": {**settings.of_the_run(), "model": settings.model, "data": settings.data},
        "training": asdict(result),
        "trained_numbers": prepared.num_trained,
        "validation_loss": validation,
    }
    (out / SUMMARY_NAME).write_text(json.dumps(summary, indent=2), encoding="utf-8")
    RunFolder(out).remove()
    return FinetuneResult(out, result, prepared.report, prepared.num_trained, validation, tuple(notes))


def compute_steps(settings: FinetuneSettings, world: World) -> None:
    """A process beside the first one: the steps alone, nothing is written."""
    prepared = _prepare(settings, lambda line: None)
    with contextlib.suppress(KeyboardInterrupt):  # the first process was asked to stop
        _run(prepared, settings, Path(str(settings.out)).expanduser(), world, None)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What a run starts with. held: the validation of data in files."""

    model: TorchModel | CompactModel
    lora: Lora | None
    samples: Source
    held: Sequence[Sample]
    report: DataReport | None

    @property
    def num_trained(self) -> int:
        if self.lora is not None:
            return count_parameters(self.lora.parameters())
        return count_parameters(list(self.model.parameters()))


def _prepare(settings: FinetuneSettings, say: Any) -> _Prepared:
    if is_drawn(settings.data):
        prepared = _prepare_drawn(settings)
        say(f"training {prepared.num_trained:,} numbers on what {settings.data} draws")
        return prepared
    if settings.compile:
        raise ConfigError("compile is for data that a program draws (--data MODULE:NAME)")
    samples, held, report = _read_samples(settings)
    say(report.text())
    device = _device(settings)
    model, lora = _model(settings, device)
    model.to(torch_device(device))
    prepared = _Prepared(model, lora, samples, held, report)
    held_text = f", {len(held):,} held out" if held else ""
    where = "" if device.kind == "cpu" else f", on {device} ({device.name})"
    say(f"training {prepared.num_trained:,} numbers on {len(samples):,} samples{held_text}{where}")
    return prepared


def _device(settings: FinetuneSettings) -> Device:
    """Where a run trains; processes share CPUs. Raises ConfigError for "cuda" where there is none."""
    if settings.processes > 1:
        return Device("cpu")
    return probe_case(settings.device).device


def _prepare_drawn(settings: FinetuneSettings) -> _Prepared:
    """A compact model of the config's shape, and the rows of a program."""
    if settings.from_scratch is None or settings.max_steps is None:
        raise ConfigError(
            f"data is the program {settings.data!r}; expected --method full --from-scratch CONFIG.json and "
            "--max-steps N beside it"
        )
    if settings.device == "cuda":
        raise ConfigError(
            "device is 'cuda', and data that a program draws is trained on the CPU; expected 'cpu' or 'auto'"
        )
    if settings.gradient_checkpointing or settings.validation is not None:
        raise ConfigError(
            "gradient_checkpointing and validation are not for data that a program draws: it draws its own"
        )
    data = load_drawn(str(settings.data))
    config = read_config(Path(settings.from_scratch).expanduser()).model
    used = data.used_tokens()
    _refuse_large(replace(config, vocabulary_size=len(used) + 1), Device("cpu"))
    model = CompactModel(config, used, settings.seed)
    vectors = data.initial_vectors(model.used, config.hidden_size)
    if vectors is not None:
        model.start_from(vectors)
    if settings.compile:
        model.compile_parts()
    rows = DrawnRows(data, settings.accumulate, settings.max_steps, settings.seed)
    return _Prepared(model, None, rows, (), None)


def _train(prepared: _Prepared, settings: FinetuneSettings, out: Path, world: World) -> TrainResult:
    events = tensorboard_writer(out / "events") if settings.tensorboard else None
    with step_progress() as show:

        def watch(row: StepRow, total: int) -> None:
            show(row, total)
            if events is not None:
                events(row)

        return _run(prepared, settings, out, world, watch)


def _run(
    prepared: _Prepared, settings: FinetuneSettings, out: Path, world: World, watch: Watch | None
) -> TrainResult:
    return train(
        prepared.model,
        prepared.samples,
        settings,
        out,
        lora=prepared.lora,
        validation=prepared.held,
        watch=watch,
        world=world,
    )


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


def _model(settings: FinetuneSettings, device: Device) -> tuple[TorchModel, Lora | None]:
    if settings.from_scratch is not None:
        config = read_config(Path(settings.from_scratch).expanduser()).model
        _refuse_large(config, device)
        return TorchModel.from_config(config, settings.seed, _dtype(settings, config)), None
    with open_checkpoint(Path(str(settings.model)).expanduser()) as opened:
        dtype = _dtype(settings, opened.config)
        if settings.method == "full":
            _refuse_large(opened.config, device)
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


def _refuse_large(config: ModelConfig, device: Device) -> None:
    needed, there = BYTES_OF_FULL * _num_weights(config), probe_hardware(()).memory_total_bytes
    if device.kind != "cpu":
        there = device.free_bytes
    if needed > there:
        where = f" on {device.name}" if device.kind != "cpu" else ""
        raise MemoryPlanError(
            f"full training of {_num_weights(config):,} weights needs {needed / 1e9:.1f} GB, and there are "
            f"{there / 1e9:.1f} GB{where}; expected --method lora, or a smaller model"
        )


def _write(prepared: _Prepared, settings: FinetuneSettings, out: Path) -> None:
    if prepared.lora is not None:
        prepared.lora.save(out, str(settings.model))
        return
    model = prepared.model
    source = None if settings.model is None else Path(settings.model).expanduser()
    whole = model.whole() if isinstance(model, CompactModel) else model
    export_checkpoint(whole, out, settings.export, source)  # type: ignore[arg-type]


def _written_loss(prepared: _Prepared, settings: FinetuneSettings, out: Path) -> float | None:
    """The validation's loss of what is on the disk now; None without validation."""
    held, samples = prepared.held, prepared.samples
    if isinstance(samples, DrawnRows):
        held = samples_of_rows(samples.validation())
    if not held:
        return None
    batches = packed_batches(held, batch_tokens(settings, held))
    there = torch_device(Device("cpu") if isinstance(samples, DrawnRows) else _device(settings))
    if settings.method == "full":
        return mean_loss(TorchModel.from_checkpoint(out).to(there), batches)
    with open_checkpoint(Path(str(settings.model)).expanduser()) as opened:
        model = TorchModel.from_checkpoint(opened, _dtype(settings, opened.config))
    load_lora(model, out)
    return mean_loss(model.to(there), batches)
