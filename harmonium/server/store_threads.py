"""Threads for calls of the store: a database that hangs must not take those that other requests need."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

NUM_THREADS = 8

_threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="harmonium-store")


async def in_store_thread(work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What the work returns, or raises."""
    call = partial(contextvars.copy_context().run, work, *arguments, **named)
    return await asyncio.get_running_loop().run_in_executor(_threads, call)
