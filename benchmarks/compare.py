#!/usr/bin/env python3
"""Are we faster than llama.cpp, ik_llama.cpp or vLLM here? All run the same weights, in turn, in one run.

    python benchmarks/compare.py CHECKPOINT --gguf FILE --llama-bench PATH --ik-bench PATH ... --out FILE

Peers are the paths of programs that are there: llama-bench gives prompts and depths, llama-server (else
llama-batched-bench) sequences together, llama-server the first token and the start. --url asks a server that
runs already (vLLM). Each round measures a group of rows (prompts, depths, ...) on every side before the next
group, each side in a process of its own that ends before the next starts, so that a machine whose speed
drifts treats all alike. A ratio is the median of the rounds' ratios, ours over theirs (over 1: ours is
better). Limits are what bandwidth and int8 operations, measured in our parts of the same run, allow our
formats to reach.

The llama-batched-bench of ik_llama.cpp gives all sequences the same token, so that all choose the same
experts: the rows "same" are ours and its in that case. Real sequences differ, as in the rows "decode".
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compare_ours import Ours
from compare_peer import AtAddress, LlamaPrograms
from compare_rows import Measured, Side, Wish
from compare_server import at_address
from compare_table import Round, print_table, report

from harmonium.config import probe_hardware
from harmonium.errors import ConfigError, HarmoniumError

PROGRAMS = ("bench", "batched_bench", "server")
PEERS: dict[str, str] = {"llama": "llama.cpp", "ik": "ik_llama.cpp"}
DEFAULT_ARGUMENTS = {
    "llama": ("-fa on -lm none --repack 1", "-fa on --no-warmup -cram 0"),
    "ik": ("-fa 1 -rtr 1 -fmoe 1 -mmp 0 -thp 1", "-fa on -rtr --no-mmap -thp --no-warmup -cram 0"),
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, metavar="CHECKPOINT", help="our checkpoint folder")
    parser.add_argument("--weights", choices=("int8", "bf16"), default="int8", help="our dense weights")
    parser.add_argument(
        "--gguf", type=Path, metavar="FILE", help="the same weights for llama.cpp and its fork"
    )
    for short, name in PEERS.items():
        add_peer(parser, short, name)
    parser.add_argument("--url", metavar="URL", help="a running server with OpenAI's completions")
    parser.add_argument("--url-name", default="vLLM", metavar="NAME", help="what to call it (vLLM)")
    rows = parser.add_argument_group("rows", "lengths as N,N,... or 'none'")
    rows.add_argument("--prefill", type=numbers, default=(512,), metavar="N,N", help="prompt lengths (512)")
    rows.add_argument("--decode", type=int, default=64, metavar="N", help="tokens of a measurement (64)")
    rows.add_argument("--depth", type=numbers, default=(0,), metavar="N,N", help="tokens in the context (0)")
    rows.add_argument("--batch", type=numbers, default=(), metavar="N,N", help="sequences together (none)")
    rows.add_argument("--batch-depth", type=int, default=32, metavar="N", help="prompt of each of them (32)")
    rows.add_argument(
        "--first-token", type=int, default=0, metavar="N", help="of a prompt of N tokens, twice"
    )
    rows.add_argument("--start", action="store_true", help="time from the start to the first token, twice")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="at most (5)")
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="start no round that would end after M minutes"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for all; default: the cores we may use")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="for one program")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the JSON here, after each round")
    return parser.parse_args(argv)


def add_peer(parser: argparse.ArgumentParser, short: str, name: str) -> None:
    group = parser.add_argument_group(name)
    for program in PROGRAMS:
        option = program.replace("_", "-")
        group.add_argument(f"--{short}-{option}", type=Path, metavar="PATH", help=f"its llama-{option}")
    texts = ("for its llama-bench", "for its llama-server and llama-batched-bench")
    for kind, default, text in zip(
        ("arguments", "server-arguments"), DEFAULT_ARGUMENTS[short], texts, strict=True
    ):
        group.add_argument(
            f"--{short}-{kind}",
            type=shlex.split,
            default=shlex.split(default),
            metavar="ARGS",
            help=f"options {text}, as one word after = (default: '{default}')",
        )
    group.add_argument(
        f"--{short}-longest", type=int, default=1 << 30, metavar="N", help="leave out what is longer (slow)"
    )


def numbers(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(int(word) for word in text.split(","))


def main(argv: Sequence[str]) -> int:
    arguments = parse(argv)
    rounds: list[Round] = []
    try:
        check_paths(arguments)
        wish, sides = wish_of(arguments), sides_of(arguments)
        settings = settings_of(arguments, wish)
        for one in run_rounds(arguments, wish, sides):
            rounds.append(one)
            if arguments.out is not None:
                arguments.out.write_text(json.dumps(report(settings, rounds), indent=1) + "\n")
    except HarmoniumError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if not rounds:
            return 130
    record = report(settings, rounds)
    if arguments.json:
        print(json.dumps(record, indent=1))
    else:
        print_table(record)
    return 0


def check_paths(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for the first path or number that cannot work, before anything is measured."""
    programs = [f"{short}_{program}" for short in PEERS for program in PROGRAMS]
    for name in programs:
        path: Path | None = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        if path is not None and not path.is_file():
            raise ConfigError(f"{option} is {path}; there is no such file")
        if path is not None:
            setattr(arguments, name, path.resolve())  # programs are started in a folder of their own
        if path is not None and not os.access(path, os.X_OK):
            raise ConfigError(f"{option} is {path}, which cannot be executed")
    if any(getattr(arguments, name) for name in programs):
        if arguments.gguf is None:
            raise ConfigError("--gguf is missing: the weights for llama.cpp and ik_llama.cpp")
        if not arguments.gguf.is_file():
            raise ConfigError(f"--gguf is {arguments.gguf}; there is no such file")
        arguments.gguf = arguments.gguf.resolve()
    if not arguments.model.exists():
        raise ConfigError(f"{arguments.model}: there is no such checkpoint")
    arguments.model = arguments.model.resolve()
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds is {arguments.rounds}; expected at least 1")


def wish_of(arguments: argparse.Namespace) -> Wish:
    wish = Wish(
        prefill=arguments.prefill,
        decode=arguments.decode,
        depth=arguments.depth,
        batch=arguments.batch,
        batch_depth=arguments.batch_depth,
        first_token=arguments.first_token,
        start=arguments.start,
        same=arguments.ik_batched_bench is not None,
    )
    if not wish.groups():
        raise ConfigError("no row is left: give one of --prefill, --depth, --batch, --first-token, --start")
    return wish


def sides_of(arguments: argparse.Namespace) -> list[Side]:
    threads = arguments.threads or len(probe_hardware(()).cores)
    sides: list[Side] = [Ours(arguments.model, arguments.weights, threads, arguments.timeout)]
    for short, name in reversed(PEERS.items()):
        bench, batched, server = (getattr(arguments, f"{short}_{program}") for program in PROGRAMS)
        if bench or batched or server:
            sides.append(
                LlamaPrograms(
                    name=name,
                    gguf=arguments.gguf,
                    threads=threads,
                    timeout=arguments.timeout,
                    bench=bench,
                    batched=batched,
                    server=server,
                    arguments=getattr(arguments, f"{short}_arguments"),
                    server_arguments=getattr(arguments, f"{short}_server_arguments"),
                    longest=getattr(arguments, f"{short}_longest"),
                )
            )
    if arguments.url:
        sides.append(AtAddress(arguments.url_name, at_address(arguments.url, arguments.timeout), 1 << 30))
    if len({side.name for side in sides}) != len(sides):
        raise ConfigError(f"--url-name is {arguments.url_name}, which another side is called")
    return sides


def settings_of(arguments: argparse.Namespace, wish: Wish) -> dict[str, Any]:
    """What decides the figures, without the paths of this machine."""
    return {
        "checkpoint": arguments.model.name,
        "threads": arguments.threads or len(probe_hardware(()).cores),
        "prefill": wish.prefill,
        "decode": wish.decode,
        "depth": wish.depth,
        "batch": wish.batch,
        "batch_depth": wish.batch_depth,
        "first_token": wish.first_token,
    }


def run_rounds(arguments: argparse.Namespace, wish: Wish, sides: Sequence[Side]) -> Iterator[Round]:
    begin = time.monotonic()
    for number in range(1, arguments.rounds + 1):
        measured = {side.name: Measured() for side in sides}
        for group in wish.groups():
            for side in sides:
                start = time.monotonic()
                found = side.measure(group, wish)
                measured[side.name].add(found)
                if found.values:
                    took = time.monotonic() - start
                    say(f"round {number} of {arguments.rounds}: {group}: {side.name} ({took:.0f} s)")
        for one in measured.values():
            one.finish()
        yield measured
        elapsed = time.monotonic() - begin
        if arguments.minutes is not None and elapsed * (number + 1) / number > arguments.minutes * 60:
            say(f"{elapsed / 60:.1f} minutes; one more round would not fit in {arguments.minutes:g}")
            return


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
