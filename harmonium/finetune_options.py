"""Options of `harmonium finetune`, one for each setting of finetune/settings.py and under the same name.

Only what the command line says gets into the namespace, so that a TOML file can say the rest. Standard
library alone, so that `harmonium --help` answers at once.
"""

from __future__ import annotations

import argparse
from typing import Any

USAGE = """harmonium finetune MODEL --data FILE.jsonl --out DIR [options]
       harmonium finetune --config FILE.toml [options]
       harmonium finetune --from-scratch CONFIG.json --data FILE.jsonl --out DIR [options]
       harmonium finetune merge MODEL ADAPTER --out DIR [--export mxfp4|bf16]
       harmonium finetune check FILE.jsonl [--max-tokens N]"""


_METHODS, _OPTIMIZERS, _SCHEDULES = (
    ("lora", "full"),
    ("adamw", "muon"),
    ("cosine", "linear", "constant", "wsd"),
)
_EFFORTS, _FORMATS, _DTYPES = ("low", "medium", "high"), ("mxfp4", "bf16"), ("float32", "bfloat16")
_DEVICES = ("auto", "cpu", "cuda")

_GROUPS: dict[str, tuple[tuple[str, Any, Any, str], ...]] = {
    "what is trained": (
        ("--method", _METHODS, str, "a LoRA adapter, or every weight of a small model (default lora)"),
        ("--from-scratch", "CONFIG", str, "random weights of the shape that this config.json gives"),
        ("--targets", "A,B", str, "of attention, experts, router (default attention,experts)"),
        ("--rank", "N", int, "of the adapter (default 8)"),
        ("--alpha", "X", float, "alpha / rank multiplies the adapter (default 2 * rank)"),
        ("--shares-a", None, bool, "the experts of a layer share one A"),
        ("--dtype", _DTYPES, str, "of the weights (default: float32; bfloat16 for LoRA of a large model)"),
        ("--export", _FORMATS, str, "experts of the checkpoint that full training or a merge writes"),
        ("--quantize-last", "X", float, "share of the steps of full training that see MXFP4 (default 0.25)"),
    ),
    "data": (
        ("--data", "FILE", str, "JSON Lines, or MODULE:NAME of a program (docs/finetune.md)"),
        ("--validation", "FILE|X", str, "a second file, or this share of the lines (such as 0.1)"),
        ("--max-tokens", "N", int, "longest sample; the rest is cut off, and reported (default 4096)"),
        ("--no-analysis-loss", None, bool, "do not train the reasoning itself"),
        ("--effort", _EFFORTS, str, "of lines that do not say it (default medium)"),
        ("--current-date", "DATE", str, "of lines that do not say it: YYYY-MM-DD, none, or drawn (default)"),
    ),
    "training": (
        ("--epochs", "N", int, "passes over the data (default 3)"),
        ("--max-steps", "N", int, "end after so many steps"),
        ("--batch-tokens", "N", int, "tokens that are computed at a time (default: the longest sample)"),
        ("--accumulate", "N", int, "batches in a step (default 1)"),
        ("--optimizer", _OPTIMIZERS, str, "muon: matrices by Muon, the rest by AdamW (default adamw)"),
        ("--lr", "X", float, "AdamW's (default 2e-4 for LoRA, 2e-5 full, 1e-3 from scratch)"),
        ("--muon-lr", "X", float, "Muon's (default 5 times --lr)"),
        ("--schedule", _SCHEDULES, str, "after the warm-up (default cosine)"),
        ("--warmup", "X", float, "share of the steps in which the rate rises (default 0.05)"),
        ("--decay", "X", float, "share of the steps in which wsd falls, at the end (default 0.5)"),
        ("--clip", "X", float, "largest norm of the gradient; 0: any (default 1)"),
        ("--weight-decay", "X", float, "of matrices (default 0)"),
        ("--balance", "X", float, "weight of the experts' even use (default 0.01; LoRA without router: 0)"),
        ("--gradient-checkpointing", None, bool, "less memory, a third more time"),
        ("--seed", "N", int, "the same seed gives the same run on one thread (default 0)"),
        ("--device", _DEVICES, str, "where it is computed (default auto: a GPU where PyTorch finds one)"),
        ("--threads", "N", int, "of each process (default: the cores that this process may use)"),
        ("--processes", "N", int, "that share the batches of a step (--accumulate; default 1)"),
        ("--compile", None, bool, "drawn data: compile first, which takes a minute and a C++ compiler"),
    ),
    "validation, stopping, saving": (
        ("--validate-every", "N", int, "steps between validations (default: once an epoch)"),
        ("--early-stopping", "N", int, "stop after so many validations without a new best"),
        ("--save-every", "N", int, "steps between saved states (default 100)"),
        ("--resume", None, bool, "go on with the run in --out from its last saved state"),
        ("--tensorboard", None, bool, "write events for TensorBoard as well"),
    ),
}


def add_finetune(parser: argparse.ArgumentParser) -> None:
    """The words and options of the command."""
    parser.usage = USAGE
    parser.add_argument("words", nargs="*", metavar="MODEL", help="the model; or merge, or check, as above")
    parser.add_argument(
        "--out", metavar="DIR", default=argparse.SUPPRESS, help="the adapter or model goes here"
    )
    parser.add_argument("--config", metavar="FILE", help="TOML with the same keys; the command line wins")
    for title, rows in _GROUPS.items():
        group = parser.add_argument_group(title)
        for option, values, kind, summary in rows:
            words: dict[str, Any] = {"default": argparse.SUPPRESS, "help": summary}
            if kind is bool:
                words["action"] = argparse.BooleanOptionalAction
            elif isinstance(values, tuple):
                words["choices"] = values
            else:
                words |= {"metavar": values, "type": kind}
            group.add_argument(option, **words)


def option_keys() -> frozenset[str]:
    """The settings' names that the options give, without MODEL and --config."""
    return frozenset(row[0][2:].replace("-", "_") for rows in _GROUPS.values() for row in rows) | {"out"}


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says, by the settings' names; targets as a tuple."""
    given = {key: value for key, value in vars(arguments).items() if key in option_keys()}
    if "targets" in given:
        given["targets"] = tuple(given["targets"].split(","))
    return given
