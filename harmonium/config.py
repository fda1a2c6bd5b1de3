"""Settings: frozen dataclasses, the machine's facts, and the one function that settles "auto".

This module is the only reader of environment variables (HARMONIUM_ISA, HARMONIUM_THREADS, HARMONIUM_API_KEY,
XDG_CACHE_HOME, TERM, OpenTelemetry's; through `environment_text` those of
hub/settings.py and server/remote.py).
Configuration is composed, never inherited; `resolve(config, hardware)` is pure, and what it returns is
printed by `harmonium inspect` and logged once at start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Literal

from harmonium.errors import ConfigError

Weights = Literal["int8", "bf16"]
"""How the dense weights are held. int8: a scale per 32, activations int8 too. bf16: as in the checkpoint."""

KvCache = Literal["bf16", "int8"]
"""How keys and values are held. int8: with a bf16 scale per 32, a little over half the memory."""

Speculation = Literal["ngram", "off"]
"""How tokens are guessed ahead. ngram: what followed the same tokens earlier in the text."""

Experts = Literal["auto", "mapped", "packed", "streamed"]
"""How MXFP4 experts are held. mapped: as they lie in the files. packed: copied in the products' order.
streamed: some in memory, the others read when they are needed."""

Computing = Literal["native", "torch"]
"""What computes a step: our kernels, or PyTorch."""

DeviceSetting = Literal["auto", "cpu", "cuda"]
"""Where PyTorch computes. auto: on a GPU where it finds one."""

ATTENTION_NAMES = ("auto", "native", "triton", "flash3", "flash2", "sdpa", "flex", "eager")
"""Implementations of attention that can be asked for; model/attention.py says what each needs."""

ISA_NAMES = ("scalar", "avx2", "avx512")
"""Instruction sets with kernels, slowest first."""

MAX_ADAPTERS = 64
"""Most LoRA adapters of one engine."""

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}")

CACHE_BLOCK_TOKENS = 32
"""P: tokens a block of the key/value cache holds."""

MAX_THREADS = 256


@dataclass(frozen=True, slots=True)
class LoraSource:
    """A LoRA adapter to serve: the name that requests give as their model, and its folder."""

    name: str
    path: Path

    def __post_init__(self) -> None:
        if not _ADAPTER_NAME.fullmatch(self.name):
            raise ConfigError(
                f"adapter name is {self.name[:140]!r}; expected 1 to 128 letters, digits and ._:/@+- "
                "that begin with a letter or a digit"
            )


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a user may set about running a model. None means "auto"; `resolve` settles it.

    weights: "int8" (fast, default) or "bf16" (exact dense weights, bf16 activations).
    context_length: longest prompt plus answer, in tokens; None: the least of the model's own limit and what
        fits in memory, at most 8,192 unless asked for more.
    max_sequences: sequences that share one step.
    max_batch_tokens: tokens in one step, so also the length of a prefill chunk.
    max_queue: requests that may wait; one more is refused with EngineBusy.
    threads: worker threads; None: the cores that this process may use.
    isa: instruction set for kernels; None: the best that the machine has.
    memory_limit_bytes: None: what the machine (and its cgroup) has available.
    prefix_cache: whether sequences share the blocks of a common beginning.
    speculation: "ngram" guesses tokens from text that came before and checks them in one step; "off" does
        not. The answers are the same.
    experts: "packed" copies MXFP4 experts into memory of the process while the first answers run, and is
        faster; "mapped" uses the files' pages, which the system can take back; "streamed" keeps some experts
        in memory and reads the others from the disk when they are needed; "auto" packs if there is room, and
        streams if they do not fit.
    expert_memory_bytes: most that experts may take, which are streamed where they need more; None: what
        memory_limit_bytes leaves.
    lora: adapters that requests may ask for.
    engine: "native", or "torch": PyTorch, slow on a CPU, needs harmonium[torch] and has no adapters.
    device: where PyTorch computes; engine "native" is the CPU's.
    attention: one of ATTENTION_NAMES; docs/attention.md says which runs where.
    kv_cache: "bf16", or "int8" for nearly twice the context in the same memory, less exactly.
    stall_seconds: about how long a step with prompt tokens may keep sequences that decode waiting; prompts
        are then computed in smaller pieces. 0: no such limit.
    cache_dir: folder in which computed prefixes are kept, so that they are there after a restart; None: not.
    cache_limit_bytes: what that folder may take for one model; the least recently used goes first.
    """

    weights: Weights = "int8"
    context_length: int | None = None
    max_sequences: int = 16
    max_batch_tokens: int = 512
    max_queue: int = 256
    threads: int | None = None
    isa: str | None = None
    memory_limit_bytes: int | None = None
    prefix_cache: bool = True
    speculation: Speculation = "ngram"
    experts: Experts = "auto"
    expert_memory_bytes: int | None = None
    kv_cache: KvCache = "bf16"
    stall_seconds: float = 0.4
    cache_dir: str | Path | None = None
    cache_limit_bytes: int = 10 << 30
    engine: Computing = "native"
    device: DeviceSetting = "auto"
    attention: str = "auto"
    lora: tuple[LoraSource, ...] = ()

    def __post_init__(self) -> None:
        if self.weights not in ("int8", "bf16"):
            raise ConfigError(f"weights is {self.weights!r}; expected 'int8' or 'bf16'")
        if self.isa is not None and self.isa not in ISA_NAMES:
            raise ConfigError(f"isa is {self.isa!r}; expected one of {', '.join(ISA_NAMES)}")
        if self.speculation not in ("ngram", "off"):
            raise ConfigError(f"speculation is {self.speculation!r}; expected 'ngram' or 'off'")
        if not 0.0 <= self.stall_seconds <= 3600.0:  # NaN fails it too
            raise ConfigError(f"stall_seconds is {self.stall_seconds!r}; expected 0 (no limit) to 3600")
        if self.experts not in ("auto", "mapped", "packed", "streamed"):
            raise ConfigError(
                f"experts is {self.experts!r}; expected 'auto', 'mapped', 'packed' or 'streamed'"
            )
        if self.expert_memory_bytes is not None and self.experts in ("mapped", "packed"):
            raise ConfigError(
                f"expert_memory_bytes is given and experts is {self.experts!r}; expected 'streamed' or 'auto'"
            )
        if self.kv_cache not in ("bf16", "int8"):
            raise ConfigError(f"kv_cache is {self.kv_cache!r}; expected 'bf16' or 'int8'")
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(f"prefix_cache is {self.prefix_cache!r}; expected True or False")
        if self.engine not in ("native", "torch"):
            raise ConfigError(f"engine is {self.engine!r}; expected 'native' or 'torch'")
        given = "adapters" if self.lora else "cache_dir" if self.cache_dir is not None else None
        given = given or ("kv_cache 'int8'" if self.kv_cache == "int8" else None)
        if self.engine == "torch" and given is not None:
            raise ConfigError(f"engine is 'torch' and {given} is given; expected 'native', which has that")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device is {self.device!r}; expected 'auto', 'cpu' or 'cuda'")
        if self.engine == "native" and self.device == "cuda":
            raise ConfigError("device is 'cuda' and engine is 'native', which runs on CPUs; expected 'torch'")
        if self.attention not in ATTENTION_NAMES:
            names = ", ".join(ATTENTION_NAMES)
            raise ConfigError(f"attention is {self.attention!r}; expected one of {names}")
        _check_adapters(self.lora)
        _check_range("max_sequences", self.max_sequences, 1, 4096)
        _check_range("max_batch_tokens", self.max_batch_tokens, 1, 65536)
        _check_range("max_queue", self.max_queue, 0, 1_000_000)
        for name, value, high in (
            ("context_length", self.context_length, 1 << 24),
            ("threads", self.threads, MAX_THREADS),
            ("memory_limit_bytes", self.memory_limit_bytes, 1 << 60),
            ("cache_limit_bytes", self.cache_limit_bytes, 1 << 60),
            ("expert_memory_bytes", self.expert_memory_bytes, 1 << 60),
        ):
            if value is not None:
                _check_range(name, value, 1, high)


def _check_adapters(lora: tuple[LoraSource, ...]) -> None:
    names = [source.name for source in lora]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two adapters are called {twice!r}; expected a name of its own for each")
    if len(names) > MAX_ADAPTERS:
        raise ConfigError(f"there are {len(names):,} adapters; expected at most {MAX_ADAPTERS}")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    # NumPy's whole numbers are welcome; bool is an int to Python and no number to a user.
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ConfigError(f"{name} is {value!r}; expected a whole number from {low:,} to {high:,}")
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value:,}; expected {low:,} to {high:,}")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What this process may use. cores: ids in the affinity mask, cut to the cgroup's quota."""

    cores: tuple[int, ...]
    memory_total_bytes: int
    memory_available_bytes: int
    isa: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings with nothing left to decide, and one line that says why each was chosen."""

    config: EngineConfig
    isa: str
    threads: int
    memory_limit_bytes: int
    reasons: Mapping[str, str]


def environment_config() -> dict[str, object]:
    """The settings that come from the environment, as keyword arguments for EngineConfig.

    Raises ConfigError when a variable holds something that cannot be used.
    """
    settings: dict[str, object] = {}
    isa = os.environ.get("HARMONIUM_ISA")
    if isa:
        if isa not in ISA_NAMES:
            raise ConfigError(f"HARMONIUM_ISA is {isa!r}; expected one of {', '.join(ISA_NAMES)}")
        settings["isa"] = isa
    threads = os.environ.get("HARMONIUM_THREADS")
    if threads:
        if not threads.isdecimal() or not 1 <= int(threads) <= MAX_THREADS:
            raise ConfigError(
                f"HARMONIUM_THREADS is {threads!r}; expected a whole number from 1 to {MAX_THREADS}"
            )
        settings["threads"] = int(threads)
    return settings


def environment_text(name: str) -> str:
    """What a variable holds, without blanks around it; "" where it is not set.

    For the variables of other programs (Hugging Face's, ModelScope's, Ollama's; hub/settings.py says which),
    and for HARMONIUM_STORE_URL.
    """
    return os.environ.get(name, "").strip()


def set_environment_default(name: str, value: str) -> None:
    """For a library that reads its settings in this process, unless the user has set it."""
    os.environ.setdefault(name, value)


def child_environment(further: Mapping[str, str]) -> dict[str, str]:
    """Our environment with these variables, for a program that we start."""
    return {**os.environ, **further}


def environment_api_keys() -> tuple[str, ...]:
    """The server's keys in HARMONIUM_API_KEY, with commas between them; () where it is not set."""
    return tuple(key.strip() for key in os.environ.get("HARMONIUM_API_KEY", "").split(",") if key.strip())


@dataclass(frozen=True, slots=True)
class TracingEnvironment:
    """What OpenTelemetry's variables say. endpoint: of a collector, None: nowhere."""

    endpoint: str | None
    service_name: str
    is_disabled: bool


def environment_tracing() -> TracingEnvironment:
    """Read OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or _ENDPOINT, OTEL_SERVICE_NAME and OTEL_SDK_DISABLED.

    Source of their meaning: OpenTelemetry's specification of environment variables.
    """
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return TracingEnvironment(
        endpoint=next((os.environ[name] for name in names if os.environ.get(name)), None),
        service_name=os.environ.get("OTEL_SERVICE_NAME") or "harmonium",
        is_disabled=os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true",
    )


def cache_folder() -> Path:
    """Where files go that can be made again: $XDG_CACHE_HOME/harmonium, or ~/.cache/harmonium. Not created.

    Raises ConfigError when there is no home folder. Source: XDG Base Directory Specification, by which a
    relative path is ignored.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if base and Path(base).is_absolute():
        return Path(base) / "harmonium"
    try:
        return Path.home() / ".cache" / "harmonium"
    except RuntimeError:
        raise ConfigError(
            "there is no home folder; set XDG_CACHE_HOME to a folder for cached files"
        ) from None


def has_escape_codes() -> bool:
    """Whether TERM names a terminal that dims text and moves the cursor; "dumb" and "unknown" do not."""
    return os.environ.get("TERM", "dumb") not in ("", "dumb", "unknown")


def resolve(config: EngineConfig, hardware: Hardware) -> Resolved:
    """Settle every "auto". Pure: the same arguments give the same answer.

    Raises ConfigError when the instruction set asked for is one that the machine lacks.
    """
    reasons: dict[str, str] = {}
    if config.isa is None:
        isa = hardware.isa[-1]
        reasons["isa"] = "the best that this processor has"
    elif config.isa in hardware.isa:
        isa = config.isa
        reasons["isa"] = "asked for"
    else:
        raise ConfigError(f"isa is {config.isa!r}; this processor has {', '.join(hardware.isa)}")
    if config.threads is None:
        threads = len(hardware.cores)
        reasons["threads"] = "one for each core that this process may use"
    else:
        threads = config.threads
        reasons["threads"] = "asked for"
        if threads > len(hardware.cores):
            reasons["threads"] = (
                f"asked for; more than the {len(hardware.cores)} cores that this process may use"
            )
    if config.memory_limit_bytes is None:
        memory = hardware.memory_available_bytes
        reasons["memory"] = "what the machine and its cgroup have available"
    else:
        memory = config.memory_limit_bytes
        reasons["memory"] = "asked for"
    return Resolved(config=config, isa=isa, threads=threads, memory_limit_bytes=memory, reasons=reasons)


def probe_hardware(isa: tuple[str, ...], root: Path = Path("/")) -> Hardware:
    """Read this machine: cores (affinity mask and cgroup quota), memory (and cgroup limit).

    isa: the instruction sets that the native code says it can run here, slowest first.
    root: where `proc` and `sys` lie; tests give a folder of their own.
    """
    cores = (
        tuple(sorted(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else tuple(range(os.cpu_count() or 1))
    )
    quota = _cgroup_cpu_quota(root)
    if quota is not None:
        cores = cores[: max(1, min(len(cores), int(quota + 0.5)))]
    total, available = _memory(root)
    limit = _cgroup_memory(root)
    if limit is not None:
        total, available = min(total, limit[0]), min(available, max(0, limit[0] - limit[1]))
    return Hardware(cores=cores, memory_total_bytes=total, memory_available_bytes=available, isa=isa)


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes as /proc/meminfo gives them; elsewhere what sysconf knows."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        return table["MemTotal"], table["MemAvailable"]
    except (OSError, KeyError, ValueError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total


def _cgroup_folders(root: Path) -> list[Path]:
    """This process's cgroup v2 folders from the innermost outwards: a limit on any of them holds."""
    base = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [base]
    relative = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    folder = base / relative
    folders = []
    while folder != base and base in folder.parents:
        folders.append(folder)
        folder = folder.parent
    return [*folders, base]


def _cgroup_cpu_quota(root: Path) -> float | None:
    """The least of the quotas, in cores; None where there is none. Source: the cgroup-v2 document."""
    quotas = []
    for folder in _cgroup_folders(root):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
        except (OSError, ValueError):
            continue
        if quota != "max" and int(period) > 0:
            quotas.append(int(quota) / int(period))
    v1 = root / "sys/fs/cgroup/cpu"
    try:
        quota_us, period_us = (
            int((v1 / "cpu.cfs_quota_us").read_text()),
            int((v1 / "cpu.cfs_period_us").read_text()),
        )
        if quota_us > 0 and period_us > 0:
            quotas.append(quota_us / period_us)
    except (OSError, ValueError):
        pass
    return min(quotas, default=None)


def _cgroup_memory(root: Path) -> tuple[int, int] | None:
    """(limit, used without the page cache) in bytes for the tightest cgroup; None where there is no limit."""
    found: list[tuple[int, int]] = []
    for folder in _cgroup_folders(root):
        try:
            limit = (folder / "memory.max").read_text().strip()
            used = int((folder / "memory.current").read_text())
        except (OSError, ValueError):
            continue
        if limit != "max":
            found.append((int(limit), max(0, used - _stat_value(folder / "memory.stat", "inactive_file"))))
    v1 = root / "sys/fs/cgroup/memory"
    try:
        limit_v1, used_v1 = (
            int((v1 / "memory.limit_in_bytes").read_text()),
            int((v1 / "memory.usage_in_bytes").read_text()),
        )
        if limit_v1 < 1 << 60:
            found.append((limit_v1, max(0, used_v1 - _stat_value(v1 / "memory.stat", "total_inactive_file"))))
    except (OSError, ValueError):
        pass
    return min(found, key=lambda pair: pair[0] - pair[1], default=None)


def _stat_value(path: Path, key: str) -> int:
    try:
        return next(
            (int(line.split()[1]) for line in path.read_text().splitlines() if line.split()[0] == key), 0
        )
    except (OSError, ValueError, IndexError):
        return 0
