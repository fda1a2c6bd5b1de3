"""What the command line accepts: the commands, their options, and how a value is read.

Standard library alone, so that `harmonium --help` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NoReturn

from harmonium import __version__
from harmonium.config import ATTENTION_NAMES, ISA_NAMES, EngineConfig, LoraSource
from harmonium.errors import ConfigError
from harmonium.eval_options import add_eval
from harmonium.finetune_options import add_finetune
from harmonium.serve_options import add_serving, add_vllm_flags, settle_serving

Effort = Literal["low", "medium", "high"]
EFFORTS: tuple[Effort, ...] = ("low", "medium", "high")
DEFAULT_EFFORT: Effort = "medium"
DEMO = "demo"
"""The word MODEL that stands for the model inside the package, and is meant where no MODEL is given."""

MODEL_HELP = (
    "a folder, a name (openai/gpt-oss-20b, 20b, 120b), `tiny`: a random one; "
    "default: `demo`, a small model in this package"
)


class _Parser(argparse.ArgumentParser):
    """argparse whose complaints are our ConfigError, so that one place prints them."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} ({self.prog} --help lists what there is)")


def near(word: str, known: Iterable[str]) -> str:
    """'; did you mean X?' for the nearest known word, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's arguments, with `command` set to its name.

    Raises ConfigError for anything that no command knows, with the nearest known word.
    """
    parser, commands = build_parser()
    first = next((word for word in argv if not word.startswith("-")), None)
    if first is not None and first not in commands:
        raise ConfigError(f"no command {first!r}{near(first, commands)} (there are {', '.join(commands)})")
    if first is None and not argv:
        raise ConfigError(f"which command? There are {', '.join(commands)} (harmonium --help says more)")
    argv, behind = _split(argv) if first == "serve" else (argv, [])
    wrong = next((word for word in argv if word not in _options(parser)), None) if first is None else None
    if wrong is not None:
        raise ConfigError(f"no option {wrong}{near(wrong, _options(parser))}")
    arguments, unknown = parser.parse_known_args(argv)
    if first == "chat" and arguments.question is None and len(unknown) == 1 and _is_text(unknown[0]):
        # argparse has given the optional question up when it reaches an option behind MODEL.
        arguments.question = unknown.pop()
    if unknown:
        options = _options(commands[first]) if first is not None else _options(parser)
        word = next((word for word in unknown if word.startswith("-") and word != "-"), None)
        if word is not None:
            raise ConfigError(f"no option {word}{near(word.split('=')[0], options)}")
        raise ConfigError(f"one word too many: {unknown[0]!r} (quote a text that has spaces)")
    if first == "serve":
        arguments.vllm_arguments = behind
        settle_serving(arguments)
    if first == "chat" and arguments.question is None and _is_question(arguments.model):
        arguments.model, arguments.question = DEMO, arguments.model
    return arguments


def _split(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """The words before `--`, and those behind it."""
    place = argv.index("--") if "--" in argv else len(argv)
    return argv[:place], argv[place + 1 :]


def _is_text(word: str) -> bool:
    """Whether argparse takes the word for an argument and not for an option."""
    return not word.startswith("-") or word == "-" or " " in word


def _is_question(word: str) -> bool:
    """Whether the only word of `harmonium chat` is what to ask, not whom: `-`, or a text that is no path."""
    if not (word.endswith("?") or any(letter.isspace() for letter in word)):
        return word == "-"
    try:
        return bool(word.strip()) and not Path(word).exists()
    except (OSError, ValueError):  # too long for a path, or a NUL in it
        return True


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def build_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and its commands' parsers by name."""
    parser = _Parser(
        prog="harmonium",
        description="Run OpenAI's open-weight gpt-oss models on this machine.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"harmonium {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    model, sampling, lora = _model_options(), _sampling_options(), _lora_option()
    commands: dict[str, argparse.ArgumentParser] = {}

    def add(name: str, summary: str, *parents: _Parser) -> argparse.ArgumentParser:
        command = subparsers.add_parser(
            name, help=summary, description=summary, parents=list(parents), allow_abbrev=False
        )
        command.set_defaults(command=name)
        commands[name] = command
        return command

    add("inspect", "Say what a checkpoint is and how it would run here.", model, lora).add_argument(
        "--json", action="store_true", help="print JSON"
    )
    _add_generate(add("generate", "Continue a text or a list of token ids.", model, lora, sampling))
    _add_chat(add("chat", "Talk with the model, or ask it one question.", model, lora, sampling))
    _add_bench(add("bench", "Measure prefill and decode on this machine.", model))
    add_serve_options(add("serve", "Serve the model over HTTP, as OpenAI's API does."))
    evaluation = add("eval", "Ask a benchmark's questions over HTTP, judge the answers, write a report.")
    add_eval(evaluation)
    _add_running(evaluation)
    _add_pull(add("pull", "Download a model, whole and checked; print its folder."))
    add_finetune(
        add("finetune", "Train a LoRA adapter, or a small model, on your examples; merge; check data.")
    )
    return parser, commands


def _model_options() -> _Parser:
    """What every command takes: the model and how to run it."""
    parent = _Parser(add_help=False)
    parent.add_argument("model", nargs="?", default=DEMO, metavar="MODEL", help=MODEL_HELP)
    group = _add_running(parent)
    group.add_argument(
        "--max-sequences", type=int, default=1, metavar="N", help="answers at a time (default 1)"
    )
    group.add_argument(
        "--engine",
        choices=("native", "torch"),
        default="native",
        help="torch: PyTorch, for GPUs; slow on a CPU (harmonium[torch])",
    )
    return parent


def _lora_option() -> _Parser:
    parent = _Parser(add_help=False)
    _add_lora(parent.add_argument_group("adapter"), "a LoRA adapter in PEFT's format")
    return parent


def _add_lora(group: argparse._ArgumentGroup, summary: str) -> None:
    group.add_argument("--lora", action="append", default=[], metavar="[NAME=]DIR", help=summary)


def _add_running(parent: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """How to run a model."""
    group = parent.add_argument_group("running the model")
    group.add_argument(
        "--weights", choices=("int8", "bf16"), default="int8", help="dense weights: int8 is fast, bf16 exact"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="default: the cores that this process may use"
    )
    group.add_argument("--context-length", type=int, metavar="N", help="most tokens of prompt and answer")
    group.add_argument(
        "--isa", choices=ISA_NAMES, help="instruction set; default: the best that this processor has"
    )
    group.add_argument(
        "--max-batch-tokens", type=int, default=512, metavar="N", help="tokens in a step (default 512)"
    )
    group.add_argument(
        "--speculation",
        choices=("ngram", "off"),
        default="ngram",
        help="guess tokens from text that came before and check several in a step (same answers)",
    )
    group.add_argument(
        "--cache-dir", metavar="DIR", help="keep computed prompts there, for answers after a restart"
    )
    group.add_argument(
        "--cache-limit",
        type=memory_bytes,
        default=10 << 30,
        metavar="SIZE",
        help="most that the folder may take for a model (default 10GiB)",
    )
    group.add_argument(
        "--stall-seconds",
        type=float,
        default=0.4,
        metavar="S",
        help="about how long a new prompt may hold up running answers at a time; 0: no limit (default 0.4)",
    )
    _add_memory(group)
    return group


def _add_memory(group: argparse._ArgumentGroup) -> None:
    """Where weights and cache lie, and what computes on them."""
    group.add_argument(
        "--experts",
        choices=("auto", "mapped", "packed", "streamed"),
        default="auto",
        help="packed: copied to memory in the products' order, faster; mapped: as they lie in the files; "
        "streamed: read from the disk when needed, for a model larger than memory",
    )
    group.add_argument(
        "--expert-memory",
        type=memory_bytes,
        metavar="SIZE",
        help="most that experts may take: streamed where they need more; default: what else is free",
    )
    group.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where --engine torch computes"
    )
    group.add_argument(
        "--attention",
        choices=ATTENTION_NAMES,
        default="auto",
        metavar="NAME",
        help=f"with --engine torch: {', '.join(ATTENTION_NAMES)} (docs/attention.md)",
    )
    group.add_argument(
        "--kv-cache",
        choices=("bf16", "int8"),
        default="bf16",
        help="keys and values: int8 takes half the memory, for long contexts, and is less exact",
    )
    group.add_argument(
        "--memory-limit", type=memory_bytes, metavar="SIZE", help="such as 14GiB; default: what is free"
    )


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """`harmonium serve`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add_serving(parser)
    running = _add_running(parser)
    _add_lora(running, "serve this LoRA adapter (PEFT's format) under this model name; again for more")
    running.add_argument(
        "--allow-lora-updates",
        action="store_true",
        help="let clients load and remove adapters (docs/lora.md)",
    )
    add_vllm_flags(running, parser)


def _sampling_options() -> _Parser:
    parent = _Parser(add_help=False)
    group = parent.add_argument_group("choosing tokens")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="longest answer; default: until the context is full"
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 is greedy (default 1)")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="X", help="keep the likeliest tokens with this sum"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="keep the N likeliest tokens (0: all)"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="X", help="keep tokens with X times the best's chance"
    )
    group.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    return parent


def _add_generate(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to continue; - reads stdin")
    prompt.add_argument("--tokens", metavar="FILE", help="token ids, a JSON list or words; - reads stdin")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="log-probabilities, with N alternatives (with --json)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")


def _add_chat(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="ask once and end; - reads stdin")
    parser.add_argument("--effort", choices=EFFORTS, help="how long to reason (default medium)")
    parser.add_argument("--system", metavar="TEXT", help="instructions for the model")
    parser.add_argument(
        "--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote"
    )
    parser.add_argument("--no-grammar", action="store_true", help="let the model write what it likes")
    parser.add_argument("--json", action="store_true", help="print one JSON object (with a question)")
    parser.add_argument(
        "--show-reasoning",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="default: show it on a terminal",
    )
    parser.add_argument("--hide-reasoning", dest="show_reasoning", action="store_false", default=None)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefill", type=counts, default=(512, 2048), metavar="N,N", help="prompt lengths to measure"
    )
    parser.add_argument(
        "--decode", type=positive, default=64, metavar="N", help="tokens to decode (default 64)"
    )
    parser.add_argument(
        "--depth", type=depths, default=(0, 4096), metavar="N,N", help="tokens already in the context"
    )
    parser.add_argument(
        "--batch", type=counts, default=(1, 4, 8, 16), metavar="N,N", help="sequences that share a step"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def lora_source(text: str) -> LoraSource:
    """'NAME=DIR', or 'DIR' alone, which takes the folder's name. Raises ConfigError."""
    name, separator, folder = text.partition("=")
    given = folder if separator else text
    if not given:
        raise ConfigError(f"--lora is {text!r}; expected NAME=DIR")
    try:
        path = Path(given).expanduser()  # no shell does it behind a "="
    except RuntimeError:
        path = Path(given)
    return LoraSource(name if separator else path.resolve().name, path)


def _add_pull(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="such as openai/gpt-oss-20b, 20b or 120b")
    parser.add_argument("--source", metavar="HUB", help="huggingface or modelscope; also HARMONIUM_SOURCE")
    parser.add_argument("--revision", metavar="NAME", help="a branch, tag or commit; also MODEL@NAME")
    parser.add_argument("--original", action="store_true", help="OpenAI's layout in place of Hugging Face's")
    parser.add_argument("--token", metavar="TOKEN", help="also HF_TOKEN, MODELSCOPE_API_TOKEN")
    parser.add_argument("--dir", metavar="FOLDER", help="a plain folder; default: the hub's cache")


_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}


def memory_bytes(text: str) -> int:
    """'14GiB', '14G', '900MB' or plain bytes as bytes. GiB is 2**30, GB and G are 10**9."""
    number = text.upper().removesuffix("B").rstrip("KMGTI")
    unit = text.upper().removesuffix("B")[len(number) :]
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected such as 14GiB or 900MB") from None


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """'512,2048' as numbers above 0."""
    return tuple(positive(word) for word in text.split(","))


def depths(text: str) -> tuple[int, ...]:
    """'0,4096' as numbers from 0."""
    wrong = next((word for word in text.split(",") if not word.isdecimal()), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r} is not a whole number from 0")
    return tuple(int(word) for word in text.split(","))


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """The settings that the options give; the engine adds the environment's. Raises ConfigError."""
    return EngineConfig(
        weights=arguments.weights,
        context_length=arguments.context_length,
        max_sequences=arguments.max_sequences,
        max_batch_tokens=arguments.max_batch_tokens,
        max_queue=getattr(arguments, "max_queue", EngineConfig().max_queue),
        threads=arguments.threads,
        isa=arguments.isa,
        memory_limit_bytes=arguments.memory_limit,
        speculation=arguments.speculation,
        lora=tuple(map(lora_source, getattr(arguments, "lora", ()))),
        experts=arguments.experts,
        expert_memory_bytes=arguments.expert_memory,
        kv_cache=arguments.kv_cache,
        stall_seconds=arguments.stall_seconds,
        cache_dir=arguments.cache_dir,
        cache_limit_bytes=arguments.cache_limit,
        engine="torch" if arguments.engine == "torch" else "native",
        device=arguments.device,
        attention=arguments.attention,
    )
