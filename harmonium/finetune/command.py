"""`harmonium finetune`, `finetune merge` and `finetune check`. PyTorch is imported by the first alone."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from harmonium.errors import ConfigError
from harmonium.finetune.data import DataSettings, read_data
from harmonium.finetune.settings import FinetuneSettings, read_settings
from harmonium.finetune_options import given_settings
from harmonium.loading import find_model, progress_bar


def run_finetune(arguments: argparse.Namespace) -> int:
    """Whatever the words after `harmonium finetune` ask for; returns the exit code."""
    words = list(arguments.words)
    given = given_settings(arguments)
    if words[:1] == ["check"]:
        return _check(words[1:], given)
    if words[:1] == ["merge"]:
        return _merge(words[1:], given)
    if len(words) > 1:
        raise ConfigError(
            f"one word too many: {words[1]!r} (expected MODEL alone; merge and check come first)"
        )
    if words:
        given["model"] = words[0]
    settings = read_settings(arguments.config, given)
    return _train(settings)


def _train(settings: FinetuneSettings) -> int:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ConfigError(
            "finetune needs PyTorch: pip install 'harmonium[torch]' (or [train], with plots)"
        ) from None
    from harmonium.finetune.run import finetune

    word = settings.model
    if word is not None:  # demo and tiny are folders in the cache
        settings = replace(settings, model=str(find_model(word)))
    try:
        result = finetune(settings, _say)
    except KeyboardInterrupt:
        _say(_how_to_go_on(settings))
        raise
    for note in result.notes:
        _say(note)
    validation = "" if result.validation_loss is None else f", validation {result.validation_loss:.4f}"
    best = (
        f" (the weights after step {result.training.best_step})" if result.validation_loss is not None else ""
    )
    kind = "adapter" if settings.method == "lora" else "model"
    print(
        f"{result.out}: {kind} after {result.training.num_steps:,} steps, loss {result.training.loss:.4f}"
        f"{validation}{best}"
    )
    where = shlex.quote(str(result.out))
    if settings.method == "lora":
        print(f"try it: harmonium chat {shlex.quote(str(word))} --lora {where}")
    else:
        print(f"try it: harmonium chat {where}")
    return 0


def _how_to_go_on(settings: FinetuneSettings) -> str:
    states = sorted(Path(str(settings.out)).expanduser().glob("training/step-*"))
    if not states:
        return "stopped before a state was saved"
    return f"stopped; {states[-1]} is the last state. To go on, give the same command and --resume"


def _check(words: list[str], given: dict[str, Any]) -> int:
    if len(words) != 1:
        raise ConfigError(f"check has {len(words)} words behind it; expected one: the data's file")
    settings = read_settings(None, given)
    data = DataSettings(
        settings.max_tokens, not settings.no_analysis_loss, settings.effort, settings.current_date
    )
    print(read_data(words[0], data)[1].text())
    return 0


def _merge(words: list[str], given: dict[str, Any]) -> int:
    from harmonium.finetune.merge import merge_adapter

    if len(words) != 2 or "out" not in given:
        raise ConfigError("merge is given too little or too much; expected: merge MODEL ADAPTER --out DIR")
    unknown = sorted(set(given) - {"out", "export"})
    if unknown:
        raise ConfigError(
            f"merge takes no --{unknown[0].replace('_', '-')}; expected --out and --export alone"
        )
    model = find_model(words[0])
    with progress_bar("merging") as progress:
        report = merge_adapter(model, words[1], given["out"], given.get("export"), progress)
    print(f"{report.folder}: {report.num_changed:,} matrices changed, experts in {report.expert_format}")
    if report.expert_rounding > report.expert_change > 0:
        print(
            f"rounding the experts to {report.expert_format} changes them by {report.expert_rounding:.2e} on "
            f"average, the adapter by {report.expert_change:.2e}: --export bf16 keeps more of it, and "
            "harmonium serve MODEL --lora keeps all",
            file=sys.stderr,
        )
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
