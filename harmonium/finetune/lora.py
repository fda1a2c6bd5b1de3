"""LoRA: small trained products beside frozen weights, MXFP4 ones too; saved as PEFT's library saves them.

Each target adds scale * (x @ A.T) @ B.T to a product, with scale = alpha / rank. B begins at zero, so that a
new adapter changes nothing. Each expert has its own A and B; with `shares_a` the experts of a layer train one
A together (in the file it stands once for each expert, as PEFT has no other form).

A and B are float32 whatever the model is, and are cast to the dtype of what they multiply.

Source of the method: LoRA, arXiv 2106.09685. Of the files: checkpoint/lora.py says which lines of PEFT.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from harmonium.checkpoint.bfloat16 import decode_bfloat16
from harmonium.checkpoint.lora import LORA_WEIGHTS_NAME, LowRank, open_lora
from harmonium.checkpoint.lora_config import LORA_CONFIG_NAME, MAX_RANK
from harmonium.checkpoint.safetensors import write_safetensors
from harmonium.errors import ConfigError
from harmonium.model.torch import TorchModel
from harmonium.model.torch_experts import PARTS, Experts, Router

Target = Literal["attention", "experts", "router"]
TARGETS: tuple[Target, ...] = ("attention", "experts", "router")

_MODULES = {
    "attention.q": "q_proj",
    "attention.k": "k_proj",
    "attention.v": "v_proj",
    "attention.out": "o_proj",
}
_EXPERTS = {"experts.gate_up": "gate_up_proj", "experts.down": "down_proj"}
_GROUPS: dict[Target, tuple[str, ...]] = {
    "attention": tuple(_MODULES),
    "experts": tuple(_EXPERTS),
    "router": ("router",),
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What is adapted, and how strongly. Raises ConfigError for a value out of range.

    targets: "attention" is q, k, v and o, "experts" gate_up and down. alpha / rank multiplies the products.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[Target, ...] = ("attention", "experts")
    shares_a: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or not 1 <= self.rank <= MAX_RANK:
            raise ConfigError(f"rank is {self.rank!r}; expected a whole number from 1 to {MAX_RANK}")
        if not 0 < self.alpha <= 1e4:
            raise ConfigError(f"alpha is {self.alpha!r}; expected more than 0, at most 10,000")
        wrong = [target for target in self.targets if target not in TARGETS]
        if wrong or not self.targets or len(set(self.targets)) != len(self.targets):
            shown = ", ".join(map(str, self.targets)) or "empty"
            raise ConfigError(f"targets is {shown}; expected some of {', '.join(TARGETS)}, each once")
        if self.shares_a and "experts" not in self.targets:
            raise ConfigError("shares_a is about experts; expected 'experts' among the targets")


class _Pair(nn.Module):
    """A [n, rank, inputs], B [m, outputs, rank]: n, m are 1 for a linear layer, E for experts (n also 1)."""

    def __init__(self, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def delta(self, x: Tensor) -> Tensor:
        """What a linear layer's product gets."""
        return (
            functional.linear(functional.linear(x, self.a[0].to(x.dtype)), self.b[0].to(x.dtype)) * self.scale
        )

    def factors(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        a, b = self.a.to(dtype), (self.b * self.scale).to(dtype)
        # unbind, not [expert]: one gradient of all experts instead of one for each.
        return list(zip(a.expand(len(b), -1, -1).unbind(0), b.unbind(0), strict=True))


class _AdaptedLinear(nn.Module):
    def __init__(self, base: nn.Linear, pair: _Pair) -> None:
        super().__init__()
        self.base, self.pair = base, pair

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.pair.delta(x)  # type: ignore[no-any-return]


class _AdaptedRouter(nn.Module):
    def __init__(self, base: Router, pair: _Pair) -> None:
        super().__init__()
        self.base, self.pair = base, pair

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.base.choose(self.base.scores(x_TD) + self.pair.delta(x_TD.float()))


class _ExpertPairs(nn.Module):
    """A layer's model.torch_experts.ExpertAdapter."""

    def __init__(self, pairs: dict[str, _Pair], dtype: torch.dtype) -> None:
        super().__init__()
        self.pairs, self.dtype = nn.ModuleDict(pairs), dtype

    def factors(self, part: str) -> Sequence[tuple[Tensor, Tensor]] | None:
        if part not in self.pairs:
            return None
        pair = self.pairs[part]
        assert isinstance(pair, _Pair)
        return pair.factors(self.dtype)


class Lora:
    """An adapter in a model: the model computes with it from now on. Use `attach_lora` or `load_lora`.

    layers: for each layer its pairs by what they change (names as in checkpoint/lora.py).
    """

    def __init__(self, model: TorchModel, settings: LoraSettings, layers: Sequence[dict[str, _Pair]]) -> None:
        self.model, self.settings, self.layers = model, settings, tuple(layers)
        model.requires_grad_(False)
        for layer, pairs in zip(model.model.layers, self.layers, strict=True):
            _install(layer, pairs)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, always in the same order; names such as "0.attention.q.a"."""
        return [
            (f"{index}.{target}.{part}", parameter)
            for index, pairs in enumerate(self.layers)
            for target, pair in pairs.items()
            for part, parameter in (("a", pair.a), ("b", pair.b))
        ]

    def parameters(self) -> list[nn.Parameter]:
        """What an optimizer takes; all else in the model is frozen."""
        return [parameter for _, parameter in self.named_parameters()]

    def save(self, folder: str | Path, base_model: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors, float32.

        folder: made where there is none; an adapter in it is replaced, each file at once. base_model: name or
        path of the model, for other programs to find it. Raises ConfigError when it cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_safetensors(folder / LORA_WEIGHTS_NAME, self._tensors())
            temporary = folder / f".{LORA_CONFIG_NAME}.{os.getpid()}.tmp"
            temporary.write_text(
                json.dumps(peft_config(self.settings, base_model), indent=2), encoding="utf-8"
            )
            temporary.replace(folder / LORA_CONFIG_NAME)
        except OSError as error:
            raise ConfigError(f"{folder}: the adapter cannot be written ({error})") from None

    def _tensors(self) -> list[tuple[str, str, npt.NDArray[Any]]]:
        listed: list[tuple[str, str, npt.NDArray[Any]]] = []
        for index, pairs in enumerate(self.layers):
            for target, pair in pairs.items():
                a, b = pair.a.detach().cpu(), pair.b.detach().cpu()
                # A: one expert after the other. B: the experts of one rank side by side.
                rows_a = a.expand(len(b), -1, -1).flatten(0, 1)
                rows_b = b.permute(1, 2, 0).flatten(1)
                prefix = f"base_model.model.model.layers.{index}.{_peft_module(target)}"
                listed.append((f"{prefix}.lora_A.weight", "F32", rows_a.numpy()))
                listed.append((f"{prefix}.lora_B.weight", "F32", rows_b.numpy()))
        return listed


def attach_lora(model: TorchModel, settings: LoraSettings, seed: int) -> Lora:
    """Freeze the model and put a new adapter into it: A random (the same for a seed), B zero.

    A's numbers are uniform within 1 / sqrt(inputs), as PEFT begins. Raises ConfigError when the model has an
    adapter already.
    """
    _refuse_second(model)
    config, generator = model.config, torch.Generator().manual_seed(seed)
    D, F, E, r = config.hidden_size, config.expert_size, config.num_experts, settings.rank
    HK, GK = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    sizes = {
        "attention.q": (1, D, HK),
        "attention.k": (1, D, GK),
        "attention.v": (1, D, GK),
        "attention.out": (1, HK, D),
        "experts.gate_up": (E, D, 2 * F),
        "experts.down": (E, F, D),
        "router": (1, D, E),
    }

    def new_pair(target: str) -> _Pair:
        count, inputs, outputs = sizes[target]
        num_a = 1 if settings.shares_a else count
        bound = inputs**-0.5
        a = torch.empty(num_a, r, inputs).uniform_(-bound, bound, generator=generator)
        return _Pair(a, torch.zeros(count, outputs, r), settings.alpha / r)

    names = [name for target in TARGETS if target in settings.targets for name in _GROUPS[target]]
    return Lora(model, settings, [{name: new_pair(name) for name in names} for _ in range(config.num_layers)])


def load_lora(model: TorchModel, folder: str | Path) -> Lora:
    """Freeze the model and put an adapter from disk into it: to train it further, or to evaluate it.

    Every A is the expert's own afterwards. Raises ConfigError when the model has an adapter already or this
    one is not of a kind that `attach_lora` makes (whole groups of targets in every layer, one rank, one
    scale), and what `open_lora` raises.
    """
    _refuse_second(model)
    with open_lora(folder, model.config) as files:
        adapter = files.load()
    pairs = [pair for layer in adapter.layers for pair in layer.values()]
    shapes = {(pair.rank, pair.scale) for pair in pairs}
    names = {frozenset(layer) for layer in adapter.layers}
    targets = tuple(target for target in TARGETS if any(set(_GROUPS[target]) <= found for found in names))
    whole = frozenset(name for target in targets for name in _GROUPS[target])
    if len(shapes) != 1 or names != {whole}:
        raise ConfigError(
            f"{folder}: changes other parts in other layers, parts of a group, or with several ranks; "
            f"expected one rank and whole groups of {', '.join(TARGETS)} in every layer"
        )
    rank, scale = shapes.pop()
    settings = LoraSettings(rank, scale * rank, targets)
    return Lora(
        model,
        settings,
        [{name: _from_file(pair) for name, pair in layer.items()} for layer in adapter.layers],
    )


def peft_config(settings: LoraSettings, base_model: str) -> dict[str, object]:
    """What adapter_config.json says."""
    parameters = []
    if "experts" in settings.targets:
        parameters += [f"mlp.experts.{part}" for part in PARTS]
    if "router" in settings.targets:
        parameters.append("mlp.router.weight")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": list(_MODULES.values()) if "attention" in settings.targets else [],
        "target_parameters": parameters or None,
    }


def _install(layer: Any, pairs: dict[str, _Pair]) -> None:
    """Put a layer's pairs where they are computed."""
    for target, name in _MODULES.items():
        if target in pairs:
            setattr(layer.self_attn, name, _AdaptedLinear(getattr(layer.self_attn, name), pairs[target]))
    experts: Experts = layer.mlp.experts
    of_experts = {part: pairs[target] for target, part in _EXPERTS.items() if target in pairs}
    if of_experts:
        experts.adapter = _ExpertPairs(of_experts, experts.gate_up_proj_bias.dtype)
    if "router" in pairs:
        layer.mlp.router = _AdaptedRouter(layer.mlp.router, pairs["router"])


def _refuse_second(model: TorchModel) -> None:
    if any(isinstance(module, _Pair) for module in model.modules()):
        raise ConfigError("the model has an adapter already; expected one without")


def _from_file(pair: LowRank) -> _Pair:
    widen: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]] = (
        decode_bfloat16 if pair.a.dtype == np.uint16 else np.asarray
    )
    a, b = (torch.from_numpy(np.array(widen(array))) for array in (pair.a, pair.b))
    if a.ndim == 2:
        a, b = a[None], b[None]
    return _Pair(a, b.mT.contiguous(), pair.scale)


def _peft_module(target: str) -> str:
    """The module in the file's keys. Of two tensors of one module the second is wrapped around the first."""
    if target in _MODULES:
        return f"self_attn.{_MODULES[target]}"
    return {
        "router": "mlp.router",
        "experts.gate_up": "mlp.experts.base_layer",
        "experts.down": "mlp.experts",
    }[target]


def count_parameters(parameters: Iterable[Tensor]) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in parameters)
