"""The child: restarted within bounds, stopped with all that it started, its last lines kept."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from harmonium.engine import vllm_process
from harmonium.engine.vllm_process import MAX_RESTARTS, VllmCommand, VllmProcess
from harmonium.errors import EngineError


def python(code: str) -> VllmCommand:
    return VllmCommand((sys.executable, "-c", code), 1)


def test_program_that_keeps_dying_is_started_again_so_often_and_no_more(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    code = f"open({str(starts)!r}, 'a').write('x'); print('no room'); raise SystemExit(3)"
    failures: list[EngineError] = []

    async def run() -> None:
        process = VllmProcess(python(code))
        await process.start()
        process.keep(failures.append)
        while not failures:
            await asyncio.sleep(0.01)
        await process.stop()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert starts.read_text() == "x" * (MAX_RESTARTS + 1)
    assert len(failures) == 1 and str(failures[0]) == "vLLM ended with code 3; its last lines:\n  no room"


def test_program_whose_children_live_on_is_started_again_and_they_are_ended(tmp_path: Path) -> None:
    """As when a vLLM's server is killed and its engine, which holds the same pipe, is not."""
    pids = tmp_path / "pids"
    code = (
        "import os, time\n"
        "child = os.fork()\n"
        f"if child: open({str(pids)!r}, 'a').write(f'{{os.getpid()}} {{child}} ')\n"
        "time.sleep(600)"
    )

    async def written(count: int) -> list[int]:
        while not pids.exists() or len(pids.read_text().split()) < count:
            await asyncio.sleep(0.01)
        return [int(word) for word in pids.read_text().split()]

    async def run() -> None:
        process = VllmProcess(python(code))
        await process.start()
        process.keep(lambda error: None)
        first, child = await written(2)
        os.kill(first, signal.SIGKILL)
        await written(4)
        await _gone([child])
        await process.stop()
        await _gone(await written(4))

    asyncio.run(asyncio.wait_for(run(), 60))


def test_stop_ends_what_ignores_sigterm_and_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_process, "_STOP_SECONDS", 0.2)
    pids = tmp_path / "pids"
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); child = os.fork();\n"
        f"open({str(pids)!r}, 'a').write(f'{{os.getpid()}} ')\n"
        "time.sleep(600)"
    )

    async def run() -> None:
        process = VllmProcess(python(code))
        await process.start()
        while not pids.exists() or len(pids.read_text().split()) < 2:
            await asyncio.sleep(0.01)
        await process.stop()
        await process.stop()
        await _gone([int(word) for word in pids.read_text().split()])

    asyncio.run(asyncio.wait_for(run(), 60))


async def _gone(pids: list[int]) -> None:
    """Wait until none of them runs: a signal takes a moment to end a process."""
    while any(map(_runs, pids)):
        await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    """Whether it does anything; a zombie that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_lines_of_any_length_and_bytes_are_read() -> None:
    code = "import sys; w = sys.stdout.buffer.write\n"
    code += "w(b'a' * 300_000 + b'\\n'); w(b'\\xff last\\n'); sys.exit(1)"

    async def run() -> EngineError:
        process = VllmProcess(python(code))
        await process.start()
        try:
            return await process.died()
        finally:
            await process.stop()

    assert str(asyncio.run(asyncio.wait_for(run(), 30))).endswith("\ufffd last")
