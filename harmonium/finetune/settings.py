"""What a training run is told: one frozen table, from a TOML file and the command line. Needs no PyTorch."""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from harmonium.config import DeviceSetting
from harmonium.errors import ConfigError

Method = Literal["lora", "full"]
Optimizer = Literal["adamw", "muon"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("lora", "full"),
    "optimizer": ("adamw", "muon"),
    "schedule": ("cosine", "linear", "constant", "wsd"),
    "effort": ("low", "medium", "high"),
    "export": ("mxfp4", "bf16"),
    "dtype": ("float32", "bfloat16"),
    "device": ("auto", "cpu", "cuda"),
}
_TARGETS = ("attention", "experts", "router")

_RANGES: dict[str, tuple[float, float]] = {
    "rank": (1, 1024),
    "alpha": (1e-3, 1e4),
    "quantize_last": (0, 1),
    "max_tokens": (8, 131_072),
    "epochs": (1, 100_000),
    "max_steps": (1, 100_000_000),
    "batch_tokens": (8, 10_000_000),
    "accumulate": (1, 100_000),
    "lr": (0, 10),
    "muon_lr": (0, 10),
    "warmup": (0, 1),
    "decay": (0, 1),
    "processes": (1, 64),
    "clip": (0, 1e6),
    "weight_decay": (0, 10),
    "balance": (0, 10),
    "seed": (0, 2**63 - 1),
    "threads": (1, 4096),
    "validate_every": (1, 100_000_000),
    "early_stopping": (1, 100_000),
    "save_every": (1, 100_000_000),
}
_WHOLE = frozenset(
    {
        "rank",
        "max_tokens",
        "epochs",
        "max_steps",
        "batch_tokens",
        "accumulate",
        "seed",
        "threads",
        "processes",
        "validate_every",
        "early_stopping",
        "save_every",
    }
)
_FLAGS = frozenset(
    {"shares_a", "no_analysis_loss", "gradient_checkpointing", "resume", "tensorboard", "compile"}
)

NOT_IN_A_RUN = frozenset(
    {
        "out",
        "resume",
        "threads",
        "processes",
        "compile",
        "save_every",
        "tensorboard",
        "data",
        "model",
        "device",
    }
)
"""Settings that may differ when a run goes on: they change its numbers by rounding at most, or are compared
otherwise."""


@dataclass(frozen=True, slots=True)
class FinetuneSettings:
    """A run's settings. Raises ConfigError for a value out of range, naming key, value and limit.

    model: a checkpoint's folder; None with from_scratch. data, out: a file and a folder. None elsewhere: a
    default that depends on the rest; docs/finetune.md has the table. validation: a file, or a share of the
    lines. quantize_last: share of the steps of full training in which the experts are used as MXFP4 rounds
    them. batch_tokens: rows of one forward pass. warmup: share of the steps; decay: the same, in which `wsd`
    (warm-up, stable, decay) falls. clip 0: no clipping. processes: that share the batches of a step. compile:
    let PyTorch compile what it can, for data that a program draws. device: where one process trains; "auto"
    is a GPU where PyTorch finds one.
    """

    model: str | None = None
    data: str | None = None
    out: str | None = None
    method: Method = "lora"
    from_scratch: str | None = None
    targets: tuple[str, ...] = ("attention", "experts")
    rank: int = 8
    alpha: float | None = None
    shares_a: bool = False
    dtype: str | None = None
    device: DeviceSetting = "auto"
    export: str = "mxfp4"
    quantize_last: float = 0.25
    validation: str | float | None = None
    max_tokens: int = 4096
    no_analysis_loss: bool = False
    effort: str = "medium"
    current_date: str = "drawn"
    epochs: int = 3
    max_steps: int | None = None
    batch_tokens: int | None = None
    accumulate: int = 1
    optimizer: Optimizer = "adamw"
    lr: float | None = None
    muon_lr: float | None = None
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    decay: float = 0.5
    clip: float = 1.0
    weight_decay: float = 0.0
    balance: float | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    threads: int | None = None
    processes: int = 1
    compile: bool = False
    validate_every: int | None = None
    early_stopping: int | None = None
    save_every: int = 100
    resume: bool = False
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for key in (field.name for field in fields(self)):
            _check(key, getattr(self, key))
        if self.from_scratch is not None and self.method != "full":
            raise ConfigError("from_scratch trains every weight; expected method 'full' beside it")
        if self.from_scratch is not None and self.model is not None:
            raise ConfigError(
                f"from_scratch and the model {self.model!r} are both given; expected one of them"
            )
        if self.processes > self.accumulate:
            raise ConfigError(
                f"processes is {self.processes}, and a step has {self.accumulate} batches (accumulate); "
                "expected no more processes than batches, which they share"
            )
        if self.processes > 1 and self.device == "cuda":
            raise ConfigError(
                f"device is 'cuda' and processes is {self.processes}, which share the CPU's cores; expected 1"
            )
        if self.early_stopping is not None and self.validation is None:
            raise ConfigError("early_stopping needs validation: a file, or a share of the lines")
        if isinstance(self.validation, (int, float)) and not 0 < self.validation < 1:
            raise ConfigError(
                f"validation is {self.validation!r}; expected a file, or a share between 0 and 1"
            )

    @property
    def learning_rate(self) -> float:
        """AdamW's highest rate."""
        if self.lr is not None:
            return self.lr
        return 1e-3 if self.from_scratch is not None else 2e-4 if self.method == "lora" else 2e-5

    @property
    def muon_rate(self) -> float:
        """Muon's highest rate."""
        return 5 * self.learning_rate if self.muon_lr is None else self.muon_lr

    @property
    def lora_alpha(self) -> float:
        """alpha / rank multiplies the adapter's products."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def balance_weight(self) -> float:
        """Weight of the load balancing loss."""
        if self.balance is not None:
            return self.balance
        return 0.01 if self.method == "full" or "router" in self.targets else 0.0

    def of_the_run(self) -> dict[str, Any]:
        """What must be the same when a run goes on, as JSON can hold it."""
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in table.items()
            if key not in NOT_IN_A_RUN
        }


KEYS = tuple(field.name for field in fields(FinetuneSettings))


def read_settings(config: str | Path | None, given: Mapping[str, Any]) -> FinetuneSettings:
    """Settings of a TOML file (None: none) and of a command line, which wins. Raises ConfigError.

    Paths in the file are relative to the working folder, as on the command line. Hyphens in keys are
    underscores.
    """
    table: dict[str, Any] = {}
    for key, value in (_read_toml(Path(config)) if config is not None else {}).items():
        name = key.replace("-", "_")
        if name not in KEYS:
            meant = difflib.get_close_matches(name, KEYS, n=1)
            raise ConfigError(f"{config}: no setting {key!r}{f'; did you mean {meant[0]}?' if meant else ''}")
        if name in table:
            raise ConfigError(f"{config}: {name} is given twice, with a hyphen and without")
        table[name] = _from_toml(name, value)
    table |= given
    if isinstance(table.get("validation"), str):
        with contextlib.suppress(ValueError):  # else it is a file's name
            table["validation"] = float(table["validation"])
    return FinetuneSettings(**table)


def _from_toml(name: str, value: object) -> object:
    if name == "targets":
        return tuple(value) if isinstance(value, list) else str(value).split(",")
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_number and name in _RANGES and name not in _WHOLE else value  # type: ignore[arg-type]


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # the extra [train] brings it
        try:
            import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]
        except ImportError:
            raise ConfigError(
                "--config needs Python 3.11, or the package tomli: pip install 'harmonium[train]'"
            ) from None
    try:
        return dict(tomllib.loads(path.read_bytes().decode("utf-8")))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None


def _check(key: str, value: object) -> None:
    if value is None:
        return
    if key in _FLAGS:
        _require(isinstance(value, bool), key, value, "true or false")
    elif key in _CHOICES:
        _require(value in _CHOICES[key], key, value, f"one of {', '.join(_CHOICES[key])}")
    elif key == "targets":
        good = (
            isinstance(value, tuple)
            and value
            and set(value) <= set(_TARGETS)
            and len(set(value)) == len(value)
        )
        _require(bool(good), key, value, f"some of {', '.join(_TARGETS)}, each once")
    elif key in _RANGES:
        low, high = _RANGES[key]
        kinds = (int,) if key in _WHOLE else (int, float)
        good = isinstance(value, kinds) and not isinstance(value, bool) and low <= value <= high
        kind = "a whole number" if key in _WHOLE else "a number"
        _require(good, key, value, f"{kind} from {low:,} to {high:,}")
    elif key == "validation":
        _require(isinstance(value, (str, float)), key, value, "a file, or a share between 0 and 1")
    else:
        _require(isinstance(value, str) and bool(value), key, value, "text")


def _require(good: bool, key: str, value: object, expected: str) -> None:
    if not good:
        raise ConfigError(f"{key} is {value!r}; expected {expected}")
