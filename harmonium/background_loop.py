"""An event loop on a thread of its own: asynchronous engines for synchronous callers, notebooks included."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Coroutine, Iterator
from typing import Any, TypeVar

from harmonium.errors import EngineClosed

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""How long `close` lets coroutines end by themselves before it cancels them."""


class BackgroundLoop:
    """Runs coroutines for any number of threads; its own thread lives until `close`."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        """False after `close`, and in a child of fork, where the thread does not live."""
        return not self._is_closing and self._thread.is_alive() and os.getpid() == self._process

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for the coroutine's result, or raise what it raises. An interrupt (Ctrl-C) cancels it.

        Raises EngineClosed when the loop is not open.
        """
        assert threading.current_thread() is not self._thread, "would wait for itself"
        with self._lock:
            if not self.is_open:
                coroutine.close()
                where = (
                    "" if os.getpid() == self._process else " in this process, which was forked from another"
                )
                raise EngineClosed(f"the model is not open{where}")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        """The events, one for each `next`; leaving the iterator closes the generator."""
        try:
            while True:
                try:
                    event = self.run(events.__anext__())
                except StopAsyncIteration:
                    return
                yield event
        finally:
            if self.is_open:
                self.run(events.aclose())

    def close(self) -> None:
        """Let what runs end, then stop: whoever waits gets a result or an error. Twice does nothing."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        if threading.current_thread() is self._thread:  # the garbage collector may run anywhere
            self._loop.call_soon(self._loop.stop)
            return
        asyncio.run_coroutine_threadsafe(_end_tasks(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _end_tasks() -> None:
    """Wait for all other tasks, cancel those that take too long, close generators that nobody runs."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        _, late = await asyncio.wait(others, timeout=GRACE_SECONDS)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
