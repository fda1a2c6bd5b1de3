#!/usr/bin/env python3
"""Are we faster than llama.cpp on this machine? Both run on the same weights, in turn, in one run.

    python benchmarks/compare.py CHECKPOINT --llama-bench PATH --gguf FILE [--llama-server PATH]

Each round measures ours, then theirs, each in a process of its own that ends before the other starts, so that
a machine whose speed drifts treats both alike. A ratio is the median of the rounds' ratios, ours over theirs
(over 1: ours is faster, or sooner ready). Limits are what bandwidth and int8 operations, measured in our part
of the same run, allow our formats to reach. Ready: from the start until the first token is there; twice a
round, the second time with the files just read. Theirs needs --llama-server.
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

from compare_peer import Key, Measured, measure_theirs, run_program
from compare_table import comparisons, print_table, report

from harmonium.bench import BenchOptions, run_bench
from harmonium.config import EngineConfig
from harmonium.errors import CheckpointError, ConfigError, HarmoniumError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="compare.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="CHECKPOINT", help="our checkpoint folder")
    parser.add_argument("--llama-bench", type=Path, required=True, metavar="PATH", help="their llama-bench")
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="the same weights for them")
    parser.add_argument(
        "--llama-server", type=Path, metavar="PATH", help="their llama-server, to time its start"
    )
    parser.add_argument(
        "--llama-arguments",
        type=shlex.split,
        default=["-fa", "on", "-lm", "none", "--repack", "1"],
        metavar="ARGS",
        help="more options for llama-bench, as one word after = (default: '-fa on -lm none --repack 1')",
    )
    parser.add_argument(
        "--server-arguments",
        type=shlex.split,
        default=["-fa", "on", "-c", "4096", "--no-warmup"],
        metavar="ARGS",
        help="more options for llama-server, as one word after = (default: '-fa on -c 4096 --no-warmup')",
    )
    parser.add_argument("--prefill", type=numbers, default=[512], metavar="N,N", help="prompt lengths")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="tokens to decode")
    parser.add_argument(
        "--depth", type=numbers, default=[0], metavar="N,N", help="tokens in the context before"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="rounds of ours, theirs (default 3)"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="for both; default: the cores we may use")
    parser.add_argument("--weights", choices=("int8", "bf16"), default="int8", help="our dense weights")
    parser.add_argument("--timeout", type=float, default=3600, metavar="S", help="for one part of a round")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--ours"]:  # the process that measures our part of a round
        print(json.dumps(measure_here(json.loads(argv[1]))))
        return 0
    arguments = parse(argv)
    try:
        check_paths(arguments)
        rounds = list(run_rounds(arguments))
    except HarmoniumError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    table = comparisons([ours for ours, _ in rounds], [theirs for _, theirs in rounds])
    if arguments.json:
        print(json.dumps(report(arguments, rounds, table), indent=2))
    else:
        print_table(rounds, table)
    return 0


def check_paths(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for the first path or number that cannot work, before anything is measured."""
    for name in ("llama_bench", "llama_server"):
        path: Path | None = getattr(arguments, name)
        option = f"--{name.replace('_', '-')}"
        if path is not None and not path.is_file():
            raise ConfigError(f"{option} is {path}; there is no such file")
        if path is not None:
            setattr(arguments, name, path.resolve())  # a bare name would be looked for in PATH
        if path is not None and not os.access(path, os.X_OK):
            raise ConfigError(f"{option} is {path}, which cannot be executed")
    if not arguments.gguf.is_file():
        raise ConfigError(f"--gguf is {arguments.gguf}; there is no such file")
    if not arguments.model.exists():
        raise ConfigError(f"{arguments.model}: there is no such checkpoint")
    if arguments.rounds < 1:
        raise ConfigError(f"--rounds is {arguments.rounds}; expected at least 1")


def run_rounds(arguments: argparse.Namespace) -> Iterator[tuple[Measured, Measured]]:
    for number in range(1, arguments.rounds + 1):
        say(f"round {number} of {arguments.rounds}: ours")
        ours = measure_ours(arguments)
        say(f"round {number} of {arguments.rounds}: theirs")
        yield ours, measure_theirs(arguments, threads=ours.about["threads"])


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure_here(wish: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: one of our rounds, as the JSON of its BenchReport, or {"error": ...}."""
    try:
        config = EngineConfig(weights=wish["weights"], threads=wish["threads"])
        options = BenchOptions(
            model=Path(wish["model"]),
            config=config,
            prefill=tuple(wish["prefill"]),
            decode=wish["decode"],
            depth=tuple(wish["depth"]),
            batch=(1,),
            repetitions=1,
            seed=wish["seed"],
        )
        return run_bench(options, say).to_json()
    except HarmoniumError as error:
        return {"error": str(error), "exit_code": error.exit_code}


def measure_ours(arguments: argparse.Namespace) -> Measured:
    wish = {
        "model": str(arguments.model),
        "weights": arguments.weights,
        "threads": arguments.threads,
        "decode": arguments.decode,
        "seed": time.time_ns() % 2**32,
    }
    bench = run_ours({**wish, "prefill": arguments.prefill, "depth": arguments.depth}, arguments.timeout)
    again = run_ours({**wish, "prefill": [], "depth": []}, arguments.timeout)
    speeds: dict[Key, float] = {}
    for row in bench["rows"]:
        key = (row["kind"], row["num_tokens"], row["depth"])
        speeds[key] = row["tokens_per_second"]
    return Measured(
        speeds, [bench["ready_seconds"], again["ready_seconds"]], bench["peak_resident_bytes"], about=bench
    )


def run_ours(wish: dict[str, Any], timeout: float) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__).resolve()), "--ours", json.dumps(wish)]
    output, _ = run_program(command, "our part", timeout)
    result: dict[str, Any] = json.loads(output)
    if "error" in result:
        kind = ConfigError if result["exit_code"] == ConfigError.exit_code else CheckpointError
        raise kind(result["error"])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
