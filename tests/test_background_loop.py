from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator

import pytest

from harmonium.background_loop import BackgroundLoop
from harmonium.errors import EngineClosed


async def answer() -> int:
    await asyncio.sleep(0)
    return 42


def test_results_and_errors_come_back() -> None:
    loop = BackgroundLoop("test")

    async def fail() -> None:
        raise KeyError("lost")

    assert loop.run(answer()) == 42
    with pytest.raises(KeyError, match="lost"):
        loop.run(fail())
    loop.close()


def test_works_inside_a_running_event_loop() -> None:
    loop = BackgroundLoop("test")

    async def notebook_cell() -> int:
        return loop.run(answer())

    assert asyncio.run(notebook_cell()) == 42
    loop.close()


def test_closed_loop_refuses_and_closing_twice_is_harmless() -> None:
    loop = BackgroundLoop("test")
    loop.close()
    loop.close()
    with pytest.raises(EngineClosed, match="not open"):
        loop.run(answer())
    assert not any(thread.name == "test" for thread in threading.enumerate())


def test_leaving_an_iterator_closes_its_generator() -> None:
    loop = BackgroundLoop("test")
    closed = threading.Event()

    async def count() -> AsyncGenerator[int, None]:
        try:
            for number in range(1000):
                yield number
        finally:
            await asyncio.sleep(0)
            closed.set()

    for number in loop.iterate(count()):
        if number == 3:
            break
    assert closed.wait(5)
    closed.clear()
    assert list(loop.iterate(count())) == list(range(1000))
    assert closed.is_set()
    loop.close()


def test_an_interrupt_cancels_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = BackgroundLoop("test")
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt(self: object, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("concurrent.futures.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        loop.run(wait())
    monkeypatch.undo()
    # Cancelled before its first step or in its sleep: either way nothing is left running.
    assert loop.run(_others()) == 0
    loop.close()


async def _others() -> int:
    await asyncio.sleep(0.01)
    return len(asyncio.all_tasks()) - 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_instead_of_waiting_for_ever() -> None:
    loop = BackgroundLoop("test")
    child = os.fork()
    if child == 0:
        try:
            loop.run(answer())
        except EngineClosed as error:
            os._exit(0 if "forked" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    loop.close()
