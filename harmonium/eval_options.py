"""Options of `harmonium eval`.

Standard library alone, so that `harmonium --help` answers at once.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

EFFORTS = ("low", "medium", "high")
DEFAULT_CONCURRENCY = 4


def add_eval(parser: argparse.ArgumentParser) -> None:
    """What is asked, of whom, how, and where the answers go."""
    parser.add_argument("task", nargs="?", metavar="TASK", help="what to ask; --list says which there are")
    parser.add_argument("--list", action="store_true", help="list the tasks and the files that they take")
    _add_server(parser.add_argument_group("who is asked"))
    _add_asking(parser.add_argument_group("asking"))
    group = parser.add_argument_group("files")
    group.add_argument("--data", type=Path, metavar="DIR", help="the data set's files; default: from the hub")
    group.add_argument("--out", type=Path, metavar="DIR", help="folder of the run (default evals/TASK)")
    group.add_argument("--resume", action="store_true", help="go on with the run that is in the folder")
    group.add_argument("--json", action="store_true", help="print the report as JSON")


def _add_server(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="serve this model for the run; default: what `harmonium serve` serves",
    )
    group.add_argument(
        "--base-url", metavar="URL", help="a server of OpenAI's API, such as http://HOST:8000/v1"
    )
    group.add_argument(
        "--model-name", metavar="NAME", help="of the server's models; default: the one there is"
    )
    group.add_argument("--api-key", metavar="KEY", help="for --base-url; also HARMONIUM_API_KEY")
    group.add_argument(
        "--timeout",
        type=_seconds,
        default=600.0,
        metavar="S",
        help="longest silence of the server (default 600)",
    )


def _add_asking(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--effort", type=efforts, metavar="low,medium,high", help="one or more (default: all of them)"
    )
    group.add_argument("--limit", type=_count, metavar="N", help="so many items, drawn by the seed")
    group.add_argument(
        "--samples", type=_count, default=1, metavar="K", help="answers to each item (default 1)"
    )
    group.add_argument(
        "--concurrency", type=_count, default=DEFAULT_CONCURRENCY, metavar="C",
        help=f"answers at a time (default {DEFAULT_CONCURRENCY})",
    )  # fmt: skip
    group.add_argument("--seed", type=_seed, default=0, metavar="S", help="of items and answers (default 0)")
    group.add_argument(
        "--max-tokens", type=_count, metavar="N", help="longest answer; default: by task and effort"
    )
    group.add_argument("--temperature", type=_temperature, metavar="X", help="default 1, for demo 0")


def efforts(text: str) -> tuple[str, ...]:
    """'low,high' in the order of EFFORTS."""
    words = text.split(",")
    wrong = next((word for word in words if word not in EFFORTS), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{wrong!r} is no effort; expected some of {','.join(EFFORTS)}")
    return tuple(effort for effort in EFFORTS if effort in words)


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 10**7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to 10,000,000")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _temperature(text: str) -> float:
    return _between(text, 0.0, 2.0)


def _seconds(text: str) -> float:
    return _between(text, 0.001, 1e6)


def _between(text: str, low: float, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
    return value
