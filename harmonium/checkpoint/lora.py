"""LoRA adapters in PEFT's file format: a folder with adapter_config.json and adapter_model.safetensors.

A low-rank pair adds scale * (x @ a.T) @ b to a product. The files hold lora_A [rank, inputs] and lora_B
[outputs, rank] for a linear layer. For the experts' fused tensors lora_A is [experts * rank, inputs], one
expert after the other, and lora_B [outputs, rank * experts], the experts of one rank side by side. Two fused
tensors of one module are wrapped one in the other, so their keys say base_layer (gate_up, the inner one) and
nothing (down); where one alone is targeted, it has the key without base_layer.

Source: huggingface/peft 0.21.2: src/peft/tuners/lora/layer.py (ParamWrapper), src/peft/tuners/
tuners_utils.py (_inject_parameters: a module's tensors in their order).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.files import shorten
from harmonium.checkpoint.lora_config import LORA_CONFIG_NAME, LoraConfig, read_lora_config
from harmonium.checkpoint.model_config import ModelConfig
from harmonium.checkpoint.safetensors import Entry, SafetensorsFile
from harmonium.errors import CheckpointError, ConfigError

LORA_WEIGHTS_NAME = "adapter_model.safetensors"

_KEY = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d{1,9})\."
    r"(self_attn\.[qkvo]_proj|mlp\.router|mlp\.experts|mlp\.experts\.base_layer)\.lora_([AB])\.weight"
)

_DENSE = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "router": "mlp.router",
}
_EXPERTS = {"experts.gate_up": "mlp.experts.gate_up_proj", "experts.down": "mlp.experts.down_proj"}

_UNSUPPORTED = (
    ("lora_magnitude_vector", "DoRA is not supported"),
    ("lora_embedding_", "adapters of embeddings are not supported"),
    ("embed_tokens", "changed embeddings are not supported"),
    ("lm_head", "a changed unembedding is not supported"),
    ("modules_to_save", "modules saved whole are not supported"),
    (".bias", "biases are not supported"),
)


@dataclass(frozen=True, slots=True)
class LowRank:
    """Adds scale * (x @ a.T) @ b to a product, or for experts that of each expert.

    a: [rank, inputs] or [experts, rank, inputs]; b: [rank, outputs] or [experts, rank, outputs]. Both are
    float32, or both bf16 bits in uint16; C-contiguous.
    """

    a: npt.NDArray[Any]
    b: npt.NDArray[Any]
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[-2])

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return self.a.nbytes + self.b.nbytes

    def delta(self, expert: int | None = None) -> npt.NDArray[np.float32]:
        """What it adds to a weight [outputs, inputs]; expert: of which, where there are several."""
        a, b = (self.a, self.b) if expert is None else (self.a[expert], self.b[expert])
        product = _widen(b).T @ _widen(a)
        return np.asarray(np.float32(self.scale) * product)


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """An adapter in memory.

    layers: for each layer the pairs by what they change: attention.q, .k, .v, .out, router, experts.gate_up,
    experts.down. digest: of everything that it computes with: equal digests compute the same.
    """

    layers: tuple[Mapping[str, LowRank], ...]
    digest: str

    @property
    def nbytes(self) -> int:
        """Bytes of memory held."""
        return sum(pair.nbytes for layer in self.layers for pair in layer.values())

    @property
    def max_rank(self) -> int:
        """The largest rank of a pair."""
        return max(pair.rank for layer in self.layers for pair in layer.values())


@dataclass(frozen=True, slots=True)
class _Placed:
    """A pair in the file, a and b by their keys there. num_experts: 0 for a product that all tokens take."""

    a: str
    b: str
    rank: int
    scale: float
    num_experts: int
    num_inputs: int
    num_outputs: int


class LoraFiles:
    """An adapter on disk whose config and header have been checked against a model; no value is read yet."""

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        """Use `open_lora`."""
        self.path = folder
        self.config = read_lora_config(folder / LORA_CONFIG_NAME)
        self._file = SafetensorsFile(folder / LORA_WEIGHTS_NAME)
        self._pairs = _match(self._file, self.config, model)

    @property
    def nbytes(self) -> int:
        """What the adapter takes in memory."""
        entries = self._file.entries
        return sum(
            (entries[pair.a].nbytes + entries[pair.b].nbytes)
            if _is_bf16(entries, pair)
            else 4 * (_size(entries[pair.a]) + _size(entries[pair.b]))
            for layer in self._pairs
            for pair in layer.values()
        )

    @property
    def max_rank(self) -> int:
        """The largest rank of a pair."""
        return max(pair.rank for layer in self._pairs for pair in layer.values())

    def load(self) -> LoraAdapter:
        """Read the values into memory. Raises CheckpointError for one that is not finite."""
        layers = tuple(
            {target: self._read(pair) for target, pair in sorted(layer.items())} for layer in self._pairs
        )
        digest = blake2b(digest_size=16)
        for index, layer in enumerate(layers):
            for target, pair in layer.items():
                digest.update(f"{index} {target} {pair.scale!r} {pair.a.dtype} {pair.rank}".encode())
                digest.update(pair.a.data)
                digest.update(pair.b.data)
        return LoraAdapter(layers, digest.hexdigest())

    def _read(self, placed: _Placed) -> LowRank:
        a, b = self._values(placed.a), self._values(placed.b)
        if a.dtype != b.dtype:
            a, b = _widen(a), _widen(b)
        rank, num_experts = placed.rank, placed.num_experts
        if num_experts:
            a = a.reshape(num_experts, rank, placed.num_inputs)
            b = b.reshape(placed.num_outputs, rank, num_experts).transpose(2, 1, 0)
        else:
            b = b.T
        # Copies, so that nothing reads the map once the adapter is loaded. order: ascontiguousarray would
        # keep what is contiguous already.
        return LowRank(np.array(a, order="C"), np.array(b, order="C"), placed.scale)

    def _values(self, name: str) -> npt.NDArray[Any]:
        """float32, or bf16 bits."""
        entry = self._file.entries[name]
        values = self._file.view(entry.dtype, entry.shape, entry.offset)
        if entry.dtype == "BF16":
            is_wrong = values & np.uint16(0x7F80) == np.uint16(0x7F80)
        else:
            values = values.astype(np.float32, copy=False)
            is_wrong = np.logical_not(np.isfinite(values))
        if is_wrong.any():
            place = [int(axis) for axis in np.unravel_index(int(is_wrong.argmax()), values.shape)]
            value = float(_widen(values[tuple(place)]))
            raise CheckpointError(
                f"{self._file.path}: tensor {shorten(name)} holds {value} at {place}; expected finite numbers"
            )
        return values

    def close(self) -> None:
        """Let go of the file. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> LoraFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_lora(path: str | Path, model: ModelConfig) -> LoraFiles:
    """Open an adapter for a model and check it whole but for its values.

    Raises ConfigError when there is no such folder, CheckpointError for what is wrong with its files.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ConfigError(f"{folder}: {what}; expected a folder with {LORA_CONFIG_NAME}")
    if not (folder / LORA_CONFIG_NAME).exists():
        inner = sorted(found.parent.name for found in folder.glob(f"*/{LORA_CONFIG_NAME}"))
        hint = f"; did you mean {folder / inner[0]}?" if inner else ""
        raise CheckpointError(f"{folder}: holds no {LORA_CONFIG_NAME}{hint}")
    if not (folder / LORA_WEIGHTS_NAME).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder}: adapter_model.bin is a pickle, which is never loaded; expected {LORA_WEIGHTS_NAME}"
        )
    return LoraFiles(folder, model)


def _widen(values: Any) -> npt.NDArray[np.float32]:
    return decode_bfloat16(values) if values.dtype == np.uint16 else values


def _size(entry: Entry) -> int:
    size = 1
    for axis in entry.shape:
        size *= axis
    return size


def _is_bf16(entries: Mapping[str, Entry], pair: _Placed) -> bool:
    return entries[pair.a].dtype == entries[pair.b].dtype == "BF16"


def _match(file: SafetensorsFile, config: LoraConfig, model: ModelConfig) -> list[dict[str, _Placed]]:
    """For each layer what the file holds, each pair checked. Raises CheckpointError."""
    _check_parameters(config, model)
    found = _sort_keys(file, model)
    layers: list[dict[str, _Placed]] = []
    for layer in range(model.num_layers):
        pairs = {}
        for target, name, module in _targets(config, layer, found):
            parts = found.pop((layer, module), {})
            if config.target_modules is None and not parts and module.startswith("self_attn"):
                continue  # a pattern that we do not evaluate may mean this one or not
            for part in "AB":
                if part not in parts:
                    raise CheckpointError(
                        f"{file.path}: layer {layer} lacks lora_{part} of {module}, which "
                        f"{LORA_CONFIG_NAME} targets"
                    )
            pair = _place(target, parts, config.rank_of(name), config.scale_of(name), model)
            _check_pair(file, pair)
            pairs[target] = pair
        layers.append(pairs)
    for (layer, module), parts in found.items():
        tensor = shorten(next(iter(parts.values())))
        raise CheckpointError(
            f"{file.path}: tensor {tensor} changes {module} of layer {layer}, which target_modules and "
            f"target_parameters of {LORA_CONFIG_NAME} do not name"
        )
    if not any(layers):
        raise CheckpointError(f"{file.path}: the adapter changes nothing")
    return layers


def _check_parameters(config: LoraConfig, model: ModelConfig) -> None:
    known = [*_EXPERTS.values(), *(f"{module}.weight" for module in _DENSE.values())]
    names = [f"model.layers.{layer}.{name}" for layer in range(model.num_layers) for name in known]
    for listed in config.target_parameters:
        if not any(name.endswith(f".{listed}") or name == listed for name in names):
            raise CheckpointError(
                f"{config.path}: target_parameters names no tensor that an adapter may change: "
                f"{shorten(listed)}; expected such as {', '.join(known[:3])}"
            )


def _sort_keys(file: SafetensorsFile, model: ModelConfig) -> dict[tuple[int, str], dict[str, str]]:
    """(layer, module) -> {"A": tensor, "B": tensor}. Raises CheckpointError for a tensor that is none."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    for tensor in file.entries:
        match = _KEY.fullmatch(tensor)
        if match is None:
            reason = next((reason for part, reason in _UNSUPPORTED if part in tensor), "it is not known")
            raise CheckpointError(
                f"{file.path}: tensor {shorten(tensor)}: {reason}; expected lora_A and lora_B of q_proj, "
                "k_proj, v_proj, o_proj, router and experts"
            )
        layer, module, part = int(match[1]), match[2], match[3]
        if layer >= model.num_layers:
            raise CheckpointError(
                f"{file.path}: tensor {shorten(tensor)} is for layer {layer}; "
                f"the model has {model.num_layers}"
            )
        parts = found.setdefault((layer, module), {})
        if part in parts:
            raise CheckpointError(
                f"{file.path}: tensors {shorten(parts[part])} and {shorten(tensor)} are one"
            )
        parts[part] = tensor
    return found


def _targets(
    config: LoraConfig, layer: int, found: Mapping[tuple[int, str], object]
) -> Iterator[tuple[str, str, str]]:
    """(what is changed, its whole name for patterns, its module in keys) of what the config targets."""
    prefix = f"model.layers.{layer}."
    for target, module in _DENSE.items():
        if config.targets_parameter(f"{prefix}{module}.weight"):
            yield target, f"{prefix}{module}.weight", module
        elif config.targets_module(prefix + module, layer) and (
            config.target_modules is not None or (layer, module) in found
        ):
            yield target, prefix + module, module
    experts = [target for target, name in _EXPERTS.items() if config.targets_parameter(prefix + name)]
    for target in experts:
        is_inner = len(experts) == 2 and target == "experts.gate_up"
        yield target, prefix + _EXPERTS[target], "mlp.experts.base_layer" if is_inner else "mlp.experts"


def _place(target: str, parts: Mapping[str, str], rank: int, scale: float, model: ModelConfig) -> _Placed:
    D, F, E = model.hidden_size, model.expert_size, model.num_experts
    q, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    sizes = {
        "attention.q": (0, D, q),
        "attention.k": (0, D, kv),
        "attention.v": (0, D, kv),
        "attention.out": (0, q, D),
        "router": (0, D, E),
        "experts.gate_up": (E, D, 2 * F),
        "experts.down": (E, F, D),
    }
    return _Placed(parts["A"], parts["B"], rank, scale, *sizes[target])


def _check_pair(file: SafetensorsFile, pair: _Placed) -> None:
    rows = pair.rank * (pair.num_experts or 1)
    of = f"{pair.num_experts} experts of rank {pair.rank}" if pair.num_experts else f"rank {pair.rank}"
    for tensor, shape in ((pair.a, (rows, pair.num_inputs)), (pair.b, (pair.num_outputs, rows))):
        entry = file.entries[tensor]
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(
                f"{file.path}: tensor {shorten(tensor)} has dtype {entry.dtype}; expected F32, F16 or BF16"
            )
        if entry.shape != shape:
            raise CheckpointError(
                f"{file.path}: tensor {shorten(tensor)} has shape {list(entry.shape)}; this model and "
                f"{LORA_CONFIG_NAME} ({of}) make it {list(shape)}"
            )
