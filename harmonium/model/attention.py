"""The table of attention implementations: what each needs, and which one computes a model here.

gpt-oss has a sink in every head and a window in every other layer. An implementation that has no sinks of its
own is still right: either its result is scaled by exp(lse) / (exp(lse) + exp(sink)), which is what one more
column of scores does to a softmax, or the sink is one more key. So nothing is refused for want of sinks.

Pure, and without PyTorch: devices and packages are facts that a caller brings (model/torch_device.py probes
them). docs/attention.md has the table in words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from harmonium.config import Computing
from harmonium.errors import ConfigError

DeviceKind = Literal["cpu", "cuda", "rocm"]

Dtype = Literal["float32", "bfloat16", "float16"]

Sinks = Literal["inside", "log-sum-exp", "extra key"]
"""How sinks are counted. inside: by the kernel. log-sum-exp: the result is scaled. extra key: one more key
without a value, whose score is the sink."""

Capability = tuple[int, int]

_SINKS_SAID: Mapping[Sinks, str] = {
    "inside": "sinks in the kernel",
    "log-sum-exp": "sinks by the exact correction from its log-sum-exp",
    "extra key": "sinks as one more key without a value",
}


@dataclass(frozen=True, slots=True)
class Device:
    """What computes. capability: NVIDIA's compute capability, (8, 0) for sm_80; None elsewhere.

    free_bytes: of the device's own memory; 0: it has none, or it was not asked.
    """

    kind: DeviceKind
    capability: Capability | None = None
    name: str = ""
    free_bytes: int = 0

    def __str__(self) -> str:
        if self.capability is None:
            return self.kind
        return f"{self.kind} {_dotted(self.capability)}"

    @property
    def dtype(self) -> Dtype:
        """What a model is held in there: NVIDIA's cards below 8.0 have no bf16 products."""
        if self.kind == "cpu" or (self.capability is not None and self.capability < (8, 0)):
            return "float32"
        return "bfloat16"


@dataclass(frozen=True, slots=True)
class Case:
    """What attention is asked for, and where.

    packages: an installed package -> "", or why it cannot be used; one that is not there is not installed.
    is_interpreted: Triton's kernels run in its interpreter (TRITON_INTERPRET=1), so on any device.
    failed: what was tried on this device and cannot be trusted -> why (model/torch_trial.py).
    """

    device: Device
    dtype: Dtype
    packages: Mapping[str, str]
    has_sinks: bool = True
    has_window: bool = True
    is_interpreted: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Implementation:
    """A row of the table. capabilities: lowest and highest compute capability on CUDA, both included."""

    name: str
    summary: str
    engine: Computing
    devices: tuple[DeviceKind, ...]
    sinks: Sinks
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
    capabilities: tuple[Capability, Capability] | None = None
    packages: tuple[str, ...] = ()

    def obstacle(self, case: Case) -> str | None:
        """Why it cannot run there, to be read behind its name; None: it can, and is right."""
        interpreted = case.is_interpreted and "triton" in self.packages
        if case.device.kind not in self.devices and not interpreted:
            return f"needs a device of kind {' or '.join(self.devices)}, and this is {case.device}"
        capability = case.device.capability
        if self.capabilities is not None and capability is not None and not interpreted:
            low, high = self.capabilities
            if not low <= capability <= high:
                wanted = f"{_dotted(low)} or later" if high == _LATEST else f"{low[0]}.x"
                return f"needs compute capability {wanted}, and this device has {_dotted(capability)}"
        if case.dtype not in self.dtypes:
            return f"computes in {' or '.join(self.dtypes)}, and this model is held in {case.dtype} here"
        for package in self.packages:
            trouble = case.packages.get(package, "is not installed")
            if trouble:
                return f"needs {package}, which {trouble}"
        if self.name in case.failed:
            return f"failed its trial on this device: {case.failed[self.name]}"
        return None


TRITON_EXPERTS = "Triton's experts"
"""Their name among what failed."""

_LATEST: Capability = (99, 9)
_HALF: tuple[Dtype, ...] = ("bfloat16", "float16")

TABLE = (
    Implementation(
        name="native",
        summary="our C++ kernel over the paged cache",
        engine="native",
        devices=("cpu",),
        sinks="inside",
        dtypes=("float32",),
    ),
    Implementation(
        name="triton",
        summary="our Triton kernel over the paged cache",
        engine="torch",
        devices=("cuda",),
        sinks="inside",
        dtypes=("float32", "bfloat16"),
        capabilities=((8, 0), _LATEST),
        packages=("triton",),
    ),
    Implementation(
        name="flash3",
        summary="FlashAttention 3",
        engine="torch",
        devices=("cuda",),
        sinks="log-sum-exp",
        dtypes=_HALF,
        capabilities=((9, 0), (9, 9)),
        packages=("flash_attn_interface",),
    ),
    Implementation(
        name="flash2",
        summary="FlashAttention 2",
        engine="torch",
        devices=("cuda",),
        sinks="log-sum-exp",
        dtypes=_HALF,
        capabilities=((8, 0), _LATEST),
        packages=("flash_attn",),
    ),
    Implementation(
        name="sdpa",
        summary="PyTorch's scaled_dot_product_attention",
        engine="torch",
        devices=("cpu", "cuda", "rocm"),
        sinks="extra key",
    ),
    Implementation(
        name="flex",
        summary="PyTorch's flex_attention; compiled on CUDA, plain on the CPU",
        engine="torch",
        devices=("cpu", "cuda"),
        sinks="log-sum-exp",
        capabilities=((8, 0), _LATEST),
        packages=("torch>=2.9",),
    ),
    Implementation(
        name="eager",
        summary="plain PyTorch, a tile of queries at a time; what training uses",
        engine="torch",
        devices=("cpu", "cuda", "rocm"),
        sinks="inside",
    ),
)
"""Sources of what each needs: the README files of Triton and FlashAttention, PyTorch's documentation."""

NAMES = tuple(row.name for row in TABLE)

AUTO_ORDER: Mapping[DeviceKind, tuple[str, ...]] = {
    # Keys are in place on a CPU: eager looks at a window layer's window alone, and has been tested longest.
    "cpu": ("eager", "sdpa"),
    "cuda": ("triton", "flash3", "flash2", "sdpa", "flex", "eager"),
    "rocm": ("sdpa", "eager"),
}
"""What "auto" tries, best first. Each ends in one that runs on every device of its kind."""


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """What computes attention. reason: why this one, for the log and `inspect`.

    has_triton_experts: MXFP4 experts are multiplied by our Triton kernels too, whatever computes attention.
    """

    name: str
    device: Device
    dtype: Dtype
    reason: str
    has_triton_experts: bool = False

    def __str__(self) -> str:
        if self.name == "native":
            return f"native ({self.reason})"
        experts = "; MXFP4 experts by Triton" if self.has_triton_experts else ""
        return f"{self.name} on {self.device}, {self.dtype} ({self.reason}{experts})"


NATIVE = AttentionChoice(
    name="native",
    device=Device("cpu"),
    dtype="float32",
    reason="our paged attention; sinks and windows are part of it on every instruction set",
)


def choose_attention(name: str, case: Case) -> AttentionChoice:
    """PyTorch's implementation for `name`, or the best for "auto". Pure.

    Raises ConfigError, which names the obstacle and what would run, for one that cannot run there. "auto"
    raises for nothing.
    """
    rows = {row.name: row for row in TABLE if row.engine == "torch"}
    passed_over: list[str] = []
    for candidate in AUTO_ORDER[case.device.kind] if name == "auto" else (name,):
        row = rows.get(candidate)
        if row is None:
            raise ConfigError(f"attention is {name!r} and engine is 'torch'; expected {_one_of(case)}")
        trouble = row.obstacle(case)
        if trouble is None:
            return AttentionChoice(
                name=row.name,
                device=case.device,
                dtype=case.dtype,
                reason=_reason(row, case, name, passed_over),
                has_triton_experts=_has_triton_experts(row, rows["triton"], case),
            )
        passed_over.append(f"{row.name} {trouble}")
    assert name != "auto", f"nothing runs on {case.device}"
    raise ConfigError(f"attention is {name!r}, which {trouble}; expected {_one_of(case)}")


def _has_triton_experts(row: Implementation, triton: Implementation, case: Case) -> bool:
    """Wherever Triton runs, but on a CPU, where it is for tests and must be asked for."""
    if TRITON_EXPERTS in case.failed:
        return False
    return row is triton or (case.device.kind != "cpu" and triton.obstacle(case) is None)


def _reason(row: Implementation, case: Case, name: str, passed_over: list[str]) -> str:
    parts = ["asked for" if name != "auto" else "the first choice that runs here"]
    if name == "auto" and not passed_over:
        parts = ["the first choice here"]
    if case.has_sinks:
        parts.append(_SINKS_SAID[row.sinks])
    parts += passed_over
    if TRITON_EXPERTS in case.failed:
        parts.append(f"{TRITON_EXPERTS} failed their trial on this device: {case.failed[TRITON_EXPERTS]}")
    return "; ".join(parts)


def _one_of(case: Case) -> str:
    """Every name that would be taken there."""
    usable = [row.name for row in TABLE if row.engine == "torch" and row.obstacle(case) is None]
    return ", ".join(["auto", *usable])


def _dotted(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"
