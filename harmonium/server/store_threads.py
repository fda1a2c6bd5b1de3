"""Threads for calls of the store: a database that hangs must not take those that other requests need.

A call that takes too long is an error for who waits; its thread goes on and is of use again when it ends.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

from harmonium.errors import StoreError

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 8
ANSWER_SECONDS = 30.0
"""Longer than a store waits by itself for a connection and then for another writer."""

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="harmonium-store")
_stuck: set[asyncio.Future[Any]] = set()


async def in_store_thread(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What the work returns, or raises. Raises StoreError when it takes longer than `ANSWER_SECONDS`."""
    call = partial(contextvars.copy_context().run, work, *arguments, **named)
    future = asyncio.get_running_loop().run_in_executor(_threads, call)
    try:
        done, _ = await asyncio.wait({future}, timeout=ANSWER_SECONDS)
    except asyncio.CancelledError:
        future.cancel()  # nobody hears what the thread says
        raise
    if not done:
        _stuck.add(future)
        future.add_done_callback(_let_go)
        raise StoreError(f"the store of responses did not answer within {ANSWER_SECONDS:g} s")
    return future.result()


def _let_go(future: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more, whatever it says."""
    _stuck.discard(future)
    if not future.cancelled():
        future.exception()


def has_stuck_threads() -> bool:
    """Whether a thread may never end: the interpreter would wait for it."""
    return bool(_stuck)
