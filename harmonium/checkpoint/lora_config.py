"""adapter_config.json of a LoRA adapter: which weights it changes, with what rank and how strongly.

Only what changes nothing but a product by a low-rank one is taken; every other kind of adapter is refused by
the name of the key that asks for it.

Source: huggingface/peft 0.21.2: src/peft/tuners/lora/{config,layer,model}.py, src/peft/utils/other.py
(get_pattern_key), src/peft/tuners/tuners_utils.py (which names a target matches).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harmonium.checkpoint.files import MAX_CONFIG_BYTES, read_json_object, shorten
from harmonium.errors import CheckpointError

LORA_CONFIG_NAME = "adapter_config.json"

MAX_RANK = 512
"""Largest rank that we take: a step's low-rank products lie in scratch. vLLM's limit is the same."""

_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "exclude_modules", "layers_to_transform", "init_lora_weights", "bias",
}  # fmt: skip

_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode",
    "lora_dropout", "megatron_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type", "unsloth_fixed",
}  # fmt: skip
"""Of training, or of where the adapter comes from: a trained adapter computes the same with any of them."""

_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base model as it is; PiSSA, CorDA, OLoRA and LoftQ change its weights."""

MAX_PATTERNS = 1000
"""A 120b with a pattern for each of its modules has 252."""

MAX_SEARCHES = 16
"""Most patterns that repeat or choose: each may try a name at very many places."""

_QUANTIFIER = re.compile(r"[*+{]")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What an adapter_config.json says, as far as it concerns what the adapter computes.

    alpha over rank (over its square root with uses_rslora) multiplies a low-rank product. rank_pattern,
    alpha_pattern: other values for names that a pattern matches. target_modules: names of linear layers, or
    their last parts; None: a pattern that is not evaluated, so whatever the file holds is targeted.
    target_parameters: names of tensors. layers: those that target_modules counts in; None: all.
    """

    path: Path
    rank: int
    alpha: float
    uses_rslora: bool = False
    rank_pattern: tuple[tuple[re.Pattern[str], int], ...] = ()
    alpha_pattern: tuple[tuple[re.Pattern[str], float], ...] = ()
    target_modules: tuple[str, ...] | None = ()
    exclude_modules: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    layers: frozenset[int] | None = None

    def rank_of(self, name: str) -> int:
        """The rank for a module or tensor by its whole name, such as model.layers.0.self_attn.q_proj."""
        return next((rank for pattern, rank in self.rank_pattern if pattern.match(name)), self.rank)

    def scale_of(self, name: str) -> float:
        """What the product of this module or tensor is multiplied by."""
        alpha = next((alpha for pattern, alpha in self.alpha_pattern if pattern.match(name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / math.sqrt(rank) if self.uses_rslora else alpha / rank

    def targets_module(self, name: str, layer: int) -> bool:
        """Whether target_modules names this linear layer. It names all there are where it is a pattern."""
        if self.target_modules is None:
            return True
        if _is_named(name, self.exclude_modules) or (self.layers is not None and layer not in self.layers):
            return False
        return _is_named(name, self.target_modules)

    def targets_parameter(self, name: str) -> bool:
        """Whether target_parameters names this tensor."""
        return _is_named(name, self.target_parameters)


def _is_named(name: str, listed: Iterable[str]) -> bool:
    return any(name == known or name.endswith(f".{known}") for known in listed)


def read_lora_config(path: Path) -> LoraConfig:
    """Read and check the file. Raises CheckpointError that names the key, its value and what is expected."""
    table = read_json_object(path, MAX_CONFIG_BYTES)
    _refuse_others(table, path)
    layers = table.get("layers_to_transform")
    if isinstance(layers, int):
        layers = [layers]
    if layers is not None and not (isinstance(layers, list) and all(_is_whole(layer, 0) for layer in layers)):
        raise _wrong(path, "layers_to_transform", table["layers_to_transform"], "layer numbers from 0")
    modules = table.get("target_modules")
    if modules == "all-linear":
        modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(
        path=path,
        rank=_rank(path, "r", table.get("r")),
        alpha=_alpha(path, "lora_alpha", table.get("lora_alpha")),
        uses_rslora=_flag(path, table, "use_rslora"),
        rank_pattern=tuple(
            (pattern, _rank(path, f"rank_pattern {shorten(key)}", value))
            for key, pattern, value in _patterns(path, table, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (pattern, _alpha(path, f"alpha_pattern {shorten(key)}", value))
            for key, pattern, value in _patterns(path, table, "alpha_pattern")
        ),
        target_modules=None if isinstance(modules, str) else _names(path, "target_modules", modules),
        exclude_modules=_names(path, "exclude_modules", table.get("exclude_modules")),
        target_parameters=_names(path, "target_parameters", table.get("target_parameters")),
        layers=None if layers is None else frozenset(layers),
    )


def _wrong(path: Path, key: str, value: object, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: {key} is {shorten(value)}; expected {expected}")


def _refuse_others(table: Mapping[str, Any], path: Path) -> None:
    """Raise for every kind of adapter but a plain LoRA."""
    if table.get("peft_type") != "LORA":
        raise _wrong(path, "peft_type", table.get("peft_type"), "'LORA': no other adapter is served")
    if table.get("bias", "none") != "none":
        raise _wrong(path, "bias", table["bias"], "'none': trained biases are not served")
    start = table.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise _wrong(path, "init_lora_weights", start, "one that leaves the base model's weights as they are")
    for key, value in table.items():
        # Lists, objects, flags and numbers that are empty, off or 0 ask for nothing.
        if key not in _READ and key not in _WITHOUT_EFFECT and value:
            raise CheckpointError(
                f"{path}: {shorten(key)} is {shorten(value)}, which is not supported; a plain LoRA of "
                "attention, router and experts is"
            )


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _rank(path: Path, key: str, value: object) -> int:
    if not _is_whole(value, 1) or not isinstance(value, int) or value > MAX_RANK:
        raise _wrong(path, key, value, f"a whole number from 1 to {MAX_RANK}")
    return value


def _alpha(path: Path, key: str, value: object) -> float:
    # abs: so that a whole number too large for a float is met here and not by float().
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) <= 1e6:
        raise _wrong(path, key, value, "a number other than 0, at most 1,000,000")
    return float(value)


def _flag(path: Path, table: Mapping[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise _wrong(path, key, value, "true or false")
    return value


def _names(path: Path, key: str, value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise _wrong(path, key, value, "a list of names")
    return tuple(value)


def _patterns(path: Path, table: Mapping[str, Any], key: str) -> list[tuple[str, re.Pattern[str], Any]]:
    value = table.get(key)
    if value is None:
        return []
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise _wrong(path, key, value, f"an object of at most {MAX_PATTERNS:,} patterns")
    searches = [text for text in value if "(" in text or _QUANTIFIER.search(text)]
    if len(searches) > MAX_SEARCHES:
        raise CheckpointError(
            f"{path}: {key} has {len(searches)} patterns with repetitions or groups, such as "
            f"{shorten(searches[0])}; expected at most {MAX_SEARCHES}"
        )
    return [(text, _pattern(path, key, text), number) for text, number in value.items()]


def _pattern(path: Path, key: str, text: str) -> re.Pattern[str]:
    """The pattern as PEFT matches it: at the end of a name, after a dot. Only such that never take long."""
    has_group_repeated = re.search(r"\)[*+?{]", text) is not None
    num_groups = text.count("(")
    is_short = len(text) <= 256 and text.count("|") <= 16 and num_groups <= 1
    # What is tried grows with the name's length to the power of the repetitions.
    if not is_short or has_group_repeated or len(_QUANTIFIER.findall(text)) > 2 - num_groups:
        raise _wrong(
            path,
            key,
            text,
            "patterns of at most 256 characters with at most 2 repetitions, or one and a group of at most 17",
        )
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except (re.error, OverflowError) as error:
        raise CheckpointError(f"{path}: {key} {shorten(text)} is no pattern ({error})") from None
