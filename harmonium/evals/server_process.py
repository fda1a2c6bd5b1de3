"""`harmonium serve` as a process of its own on a free port of this machine, for the time of a run."""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from harmonium.errors import ConfigError, EngineError

PROMPT_TOKENS = 8_192
"""Room for the question beside the longest answer: the longest of MMLU's and GPQA's take a few thousand."""

_COMMAND = (
    sys.executable,
    "-c",
    # `-m harmonium` would take a folder of that name in the working folder for the package.
    "import sys; sys.path[:] = filter(None, sys.path); from harmonium.__main__ import main; sys.exit(main())",
)

_PASSED_ON = (
    "weights",
    "kv_cache",
    "threads",
    "isa",
    "max_batch_tokens",
    "speculation",
    "experts",
    "expert_memory",
    "memory_limit",
)


def serve_words(
    model: str | None, arguments: argparse.Namespace, concurrency: int, max_tokens: int
) -> list[str]:
    """The command's words after `harmonium`.

    model: None leaves it to the server, which then serves its own. max_tokens: longest answer; the context is
    as long as that and a prompt, at most the model's own. Raises ConfigError when `inspect` refuses the
    model.
    """
    words = ["serve", *([model] if model is not None else []), "--port", "0"]
    words += ["--max-concurrency", str(concurrency), "--max-queue", str(2 * concurrency)]
    for name in _PASSED_ON:
        value = getattr(arguments, name, None)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    context = arguments.context_length
    if context is None and model is not None:
        longest = _longest_context(model)
        context = min(max_tokens + PROMPT_TOKENS, longest) if longest is not None else None
    return words + (["--context-length", str(context)] if context is not None else [])


def _longest_context(model: str) -> int | None:
    """The model's own limit, as `harmonium inspect` says it."""
    done = subprocess.run(
        [*_COMMAND, "inspect", model, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    if not done.stdout.strip():
        told = done.stderr.strip().splitlines()
        raise ConfigError((told[-1] if told else f"{model} cannot be used").removeprefix("harmonium: "))
    try:
        return int(json.loads(done.stdout)["model"]["config"]["max_context"])
    except (ValueError, KeyError, TypeError):
        return None


@contextmanager
def served(words: Sequence[str]) -> Iterator[str]:
    """The server's address, with /v1, while it runs. What it writes to stderr is shown only if it fails.

    Raises EngineError with its last line when it does not become ready.
    """
    command = [*_COMMAND, *words]
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is ours: the report is written first
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # no thread runs yet
    ) as process:
        try:
            yield f"{_address(process)}/v1"
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # it lets answers end that nobody waits for any more
                process.kill()


def _end_with_parent() -> None:
    """A run that is killed leaves no server behind, whose memory the next run would miss."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, ctypes.c_ulong(signal.SIGTERM))


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    last: collections.deque[str] = collections.deque(maxlen=1)
    address = None
    for line in process.stderr:
        last.append(line.strip())
        found = re.search(r"listening on (http://\S+)", line)
        address = found[1] if found else address
        if address is not None and re.search(r"\bready: ", line):
            # The pipe has to be emptied for as long as the server writes to it.
            threading.Thread(target=_drain, args=(process,), daemon=True).start()
            return address
    told = last[0].removeprefix("harmonium: ") if last else "it said nothing"
    raise EngineError(f"the server did not start: {told}")


def _drain(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    with contextlib.suppress(ValueError, OSError):
        for _ in process.stderr:
            pass
