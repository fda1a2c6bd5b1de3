"""`vllm serve` as our child: started, watched, restarted within bounds, and never left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from harmonium.errors import ConfigError, EngineError

_log = logging.getLogger("harmonium.vllm")

MAX_RESTARTS = 3
"""Within RESTART_SECONDS; what dies more often than that will not be helped by another start."""

RESTART_SECONDS = 900.0

_LINES = 60
_SHOWN_LINES = 20
_STOP_SECONDS = 30.0
_MAX_LINE_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1

NUM_HEADS = 64
"""Attention heads of both gpt-oss models; tensor parallelism shares them out. Source: their config.json."""

_PARALLEL = ("--tensor-parallel-size", "-tp")
_ADDRESS = ("--host", "--port", "--api-key", "--uds", "--ssl-keyfile", "--ssl-certfile", "--root-path")


@dataclass(frozen=True, slots=True)
class VllmCommand:
    """What is started. words: the command line. port: where it will listen, on this machine. environment:
    the child's, None: ours.
    """

    words: tuple[str, ...]
    port: int
    environment: Mapping[str, str] | None = field(default=None, repr=False)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def vllm_command(
    program: str, model: str, given: Sequence[str], environment: Mapping[str, str] | None = None
) -> VllmCommand:
    """`program serve model ...` on a free port of this machine, with the options that were given.

    Raises ConfigError for options that are ours to set, and for a tensor parallel size that cannot be.
    """
    for word in given:
        if word.split("=")[0] in _ADDRESS:
            raise ConfigError(
                f"{word.split('=')[0]} is given behind --launch-vllm --; Harmonium sets where vLLM listens "
                "(put it before, where it says where Harmonium listens)"
            )
    _check_parallel(given)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    words = [program, "serve", model, "--host", "127.0.0.1", "--port", str(port), *given]
    if "--enable-prompt-tokens-details" not in given and "--no-enable-prompt-tokens-details" not in given:
        words.append("--enable-prompt-tokens-details")  # or its answers say nothing of cached tokens
    return VllmCommand(tuple(words), port, environment)


def _check_parallel(given: Sequence[str]) -> None:
    legal = [size for size in range(1, NUM_HEADS + 1) if NUM_HEADS % size == 0]
    for place, word in enumerate(given):
        name, has_value, value = word.partition("=")
        if name not in _PARALLEL:
            continue
        text = value if has_value else next(iter(given[place + 1 : place + 2]), "")
        if not text.isdecimal() or int(text) not in legal:
            raise ConfigError(
                f"{name} is {text!r}; gpt-oss has {NUM_HEADS} attention heads, "
                f"so expected one of {', '.join(map(str, legal))}"
            )


class VllmProcess:
    """The child, from `start` to `stop`."""

    def __init__(self, command: VllmCommand) -> None:
        self.command = command
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._keeper: asyncio.Task[None] | None = None
        self._starts: deque[float] = deque(maxlen=MAX_RESTARTS)

    @property
    def pid(self) -> int | None:
        """Of the child that runs, or ran last."""
        return None if self._process is None else self._process.pid

    @property
    def last_line(self) -> str:
        """What it said last; "" before it said anything."""
        return self._lines[-1] if self._lines else ""

    async def start(self) -> None:
        """Start it. Raises ConfigError when there is no such program."""
        program = self.command.words[0]
        if shutil.which(program) is None:
            raise ConfigError(
                f"there is no program {program!r} (install vLLM in an environment of its own and give its "
                "program with --vllm-command, or start it and use --engine vllm=URL)"
            )
        self._lines.clear()
        self._process = await asyncio.create_subprocess_exec(
            *_dying_with_us(),
            *self.command.words,
            env=self.command.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_MAX_LINE_BYTES,
            start_new_session=True,  # a Ctrl-C is for us: we let its answers end first
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "it is a pipe"
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the limit; what is left of it comes as another line
                continue
            if not line:
                return
            text = line.decode(errors="replace").rstrip()
            if text:
                self._lines.append(text)
                _log.debug("%s", text)

    async def died(self) -> EngineError:
        """Wait for its end; what to say of it, with its last lines."""
        assert self._process is not None and self._reader is not None, "it was started"
        code = await _ended(self._process)
        await asyncio.wait({self._reader}, timeout=1.0)  # its own children may hold the pipe open
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        lines = "\n  ".join(list(self._lines)[-_SHOWN_LINES:])
        return EngineError(
            f"vLLM {how}; its last lines:\n  {lines}" if lines else f"vLLM {how} and said nothing"
        )

    def keep(self, failed: Callable[[EngineError], None]) -> None:
        """From now on start it again when it ends; `failed` is called when it ends too often."""
        self._keeper = asyncio.create_task(self._keep(failed))

    async def _keep(self, failed: Callable[[EngineError], None]) -> None:
        while True:
            error = await self.died()
            now = time.monotonic()
            if len(self._starts) == MAX_RESTARTS and now - self._starts[0] < RESTART_SECONDS:
                failed(error)
                return
            self._starts.append(now)
            _log.error("%s", error)
            _log.warning("vLLM is started again (%d of %d)", len(self._starts), MAX_RESTARTS)
            self._kill(signal.SIGKILL)  # what it left behind may hold the GPU's memory
            await asyncio.sleep(2.0 ** (len(self._starts) - 1) - 1.0)
            try:
                await self.start()
            except ConfigError as refusal:
                failed(EngineError(str(refusal)))
                return

    async def stop(self) -> None:
        """End it, with all that it started; at most some 30 s. A second call does nothing."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            ending = asyncio.create_task(_ended(process))
            await asyncio.wait({ending}, timeout=_STOP_SECONDS)
        _kill_group(process.pid, signal.SIGKILL)
        await _ended(process)
        if self._reader is not None:
            await asyncio.wait({self._reader}, timeout=2.0)
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def _kill(self, number: signal.Signals) -> None:
        if self._process is not None:
            _kill_group(self._process.pid, number)


async def _ended(process: asyncio.subprocess.Process) -> int:
    """Its exit code, when it has ended. Process.wait also waits for its children to let go of the pipe."""
    while process.returncode is None:
        await asyncio.sleep(0.05)
    return process.returncode


def _kill_group(pid: int, number: signal.Signals) -> None:
    """To whatever is left of the child's session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _dying_with_us() -> tuple[str, ...]:
    """Words in front of a command: on Linux the program gets SIGTERM when we die, even by SIGKILL.

    A program of its own that becomes the other: code between fork and exec is not safe beside threads.
    """
    if sys.platform != "linux":
        return ()
    ask = f"ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGTERM)}, 0, 0, 0)"
    code = f"import ctypes, os, sys; {ask}; os.execvp(sys.argv[1], sys.argv[1:])"
    return (sys.executable, "-I", "-S", "-c", code)
