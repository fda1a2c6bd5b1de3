"""Options of `harmonium serve`, and the flags that people copy from vLLM commands.

Standard library alone, so that `harmonium --help` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

DEFAULT_PORT = 8000
DEFAULT_MAX_CONCURRENCY = 4
REMOTE_MAX_CONCURRENCY = 256
"""Where vLLM computes: it has a queue of its own."""

DEFAULT_MAX_QUEUE = 64


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Where to listen, who may come in, how answers are made."""
    _add_listening(parser.add_argument_group("listening"))
    _add_answers(parser.add_argument_group("answers"))
    group = parser.add_argument_group("state")
    group.add_argument(
        "--store", metavar="FILE", help="where responses are kept (SQLite); default: in memory until the end"
    )
    group.add_argument(
        "--store-url",
        metavar="URL",
        help="keep them in a database that several servers share (docs/store.md): "
        "postgresql://USER@HOST/NAME or sqlite:///FILE; also HARMONIUM_STORE_URL",
    )
    group.add_argument(
        "--engine",
        metavar="ENGINE",
        help="native; torch: PyTorch, for GPUs; vllm=URL[,URL]: vLLM computes (docs/vllm.md); script:FILE: "
        "answers from a file, no model (docs/api.md)",
    )
    add_replicas(group)
    group.add_argument(
        "--launch-vllm",
        action="store_true",
        help="start `vllm serve MODEL` and use it; what stands behind `--` is for it",
    )
    group.add_argument(
        "--vllm-command", default="vllm", metavar="PROGRAM", help="which vllm that is (default: of PATH)"
    )


def add_replicas(group: argparse._ArgumentGroup) -> None:
    """Several servers as one, on Ray."""
    group.add_argument(
        "--replicas",
        metavar="N|MIN:MAX",
        help="so many engines behind one address, on Ray (extra [ray]; docs/cluster.md)",
    )
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a running Ray cluster, such as auto; default: this machine",
    )


def settle_serving(arguments: argparse.Namespace) -> None:
    """The defaults that depend on other options."""
    if arguments.max_concurrency is None:
        is_remote = arguments.launch_vllm or (arguments.engine or "").startswith("vllm=")
        arguments.max_concurrency = REMOTE_MAX_CONCURRENCY if is_remote else DEFAULT_MAX_CONCURRENCY


def _add_answers(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME", help="names that requests may use"
    )
    group.add_argument(
        "--max-concurrency",
        "--max-num-seqs",
        type=int,
        metavar="N",
        help=f"answers that run at once (default {DEFAULT_MAX_CONCURRENCY}; "
        f"{REMOTE_MAX_CONCURRENCY} where vLLM computes)",
    )
    group.add_argument(
        "--max-queue",
        type=int,
        default=DEFAULT_MAX_QUEUE,
        metavar="N",
        help=f"answers that may wait; one more gets 429 (default {DEFAULT_MAX_QUEUE})",
    )
    group.add_argument("--effort", default="medium", help="low, medium or high, where a request says nothing")
    group.add_argument("--date", metavar="YYYY-MM-DD", help="what the model is told; default: today (UTC)")
    group.add_argument("--no-grammar", action="store_true", help="let the model write what it likes")
    group.add_argument(
        "--reasoning-field",
        choices=("both", "reasoning_content", "reasoning"),
        default="both",
        help="under which name chat completions give the reasoning (default both)",
    )
    group.add_argument(
        "--limit",
        action="append",
        default=[],
        metavar="NAME=N",
        help="such as tools=512; docs/api.md lists them",
    )


def _add_listening(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    group.add_argument(
        "--port", type=int, default=DEFAULT_PORT, help=f"0 takes a free one (default {DEFAULT_PORT})"
    )
    group.add_argument(
        "--api-key",
        nargs="+",
        default=[],
        metavar="KEY",
        help="one of them must come with each request; also HARMONIUM_API_KEY",
    )
    group.add_argument(
        "--insecure", action="store_true", help="listen beyond this machine without a key, for everybody"
    )
    group.add_argument(
        "--cors",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="web pages that may call, such as https://x.org",
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds for running answers after SIGTERM",
    )
    group.add_argument(
        "--otlp-endpoint",
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send OpenTelemetry spans there (extra [otel]; also OTEL_EXPORTER_OTLP_ENDPOINT)",
    )
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="log lines on stderr")


class _Told(argparse.Action):
    """A flag of another server that we take without effect; `told` says once why."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        namespace.told = [*(namespace.told or []), f"{option_string}: {self.const}"]


class _Instead(argparse.Action):
    """A flag of another server (vLLM, llama-server) that has another name here."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} is another server's; {self.const}")


_WITHOUT_EFFECT: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("--trust-remote-code", "--trust_remote_code"), 0, "no code comes with a checkpoint here"),
    (("--enable-auto-tool-choice",), 0, "tools are always understood"),
    (("--enable-prefix-caching", "--no-enable-log-requests", "--disable-log-requests"), 0, "so it is anyway"),
    (("--tool-call-parser", "--reasoning-parser"), 1, "the Harmony format is always parsed"),
    (("--async-scheduling", "--no-async-scheduling", "--jinja"), 0, "so it is anyway"),
    (("--swap-space", "--cpu-offload-gb"), 1, "everything is in this machine's memory already"),
    (("-ngl", "--gpu-layers", "--n-gpu-layers"), 1, "everything is computed on the CPU"),
    (("--enable-lora",), 0, "--lora NAME=DIR says which adapters are served"),
    (("--max-lora-rank", "--max-loras", "--max-cpu-loras"), 1, "all adapters given are served at any rank"),
)
_INSTEAD: tuple[tuple[tuple[str, ...], str], ...] = (
    (("--gpu-memory-utilization",), "use --memory-limit SIZE"),
    (("--quantization", "-q"), "use --weights int8 or bf16; the experts stay as the checkpoint has them"),
    (("--tokenizer", "--chat-template"), "the vocabulary and the format are built in"),
    (("--reasoning-format",), "use --reasoning-field both, reasoning_content or reasoning"),
    (("-np", "--parallel"), "use --max-concurrency N"),
    (("--alias",), "use --served-model-name NAME"),
    (("-m", "--model"), "give the folder of the checkpoint as the word behind `harmonium serve`"),
    (("--kv-cache-dtype", "--cache-type-k", "-ctk", "--cache-type-v", "-ctv"), "use --kv-cache bf16 or int8"),
    (("--max-num-batched-tokens",), "use --max-batch-tokens N"),
)


def add_vllm_flags(running: argparse._ArgumentGroup, parser: argparse.ArgumentParser) -> None:
    """Understand what people copy: aliases, flags without effect, flags with another name here."""
    parser.set_defaults(told=None)
    hidden = argparse.SUPPRESS
    running.add_argument(
        "--lora-modules", dest="lora", nargs="+", action="extend", default=hidden, help=hidden
    )
    running.add_argument(
        "--max-model-len", "-c", "--ctx-size", dest="context_length", type=int, default=hidden, help=hidden
    )
    parser.add_argument("--dtype", type=_dtype, help=hidden)
    for names, count, reason in _WITHOUT_EFFECT:
        nargs = 0 if count == 0 else None
        parser.add_argument(
            *names, action=_Told, nargs=nargs, const=reason, dest="told", default=hidden, help=hidden
        )
    for names, hint in _INSTEAD:
        parser.add_argument(
            *names, action=_Instead, nargs="?", const=hint, dest="told", default=hidden, help=hidden
        )
    for name in ("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "--data-parallel-size"):
        parser.add_argument(name, type=_one, dest="parallel", default=hidden, help=hidden)


def _dtype(text: str) -> str:
    if text != "auto":
        raise argparse.ArgumentTypeError(f"{text!r} is vLLM's; use --weights bf16 (exact) or --weights int8")
    return text


def _one(text: str) -> int:
    if text != "1":
        raise argparse.ArgumentTypeError(
            f"{text!r}: one process serves one machine here; leave it out, or let vLLM compute: "
            "--launch-vllm -- --tensor-parallel-size N (docs/vllm.md)"
        )
    return 1
