"""Several streams as one, each item as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


async def merge(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the source, item) until all sources have ended; what one raises ends all. Closes them.

    Sources are read one item ahead at most, so a slow reader slows them all.
    """
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | _End] = asyncio.Queue(maxsize=len(sources))
    readers = [asyncio.create_task(_read(index, source, queue)) for index, source in enumerate(sources)]
    open_sources = len(readers)
    try:
        while open_sources:
            entry = await queue.get()
            if isinstance(entry, _End):
                open_sources -= 1
                if entry.error is not None:
                    raise entry.error
            else:
                yield entry
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _End:
    """A source has ended. error: with this."""

    error: Exception | None = None


async def _read(
    index: int, source: AsyncGenerator[T, None], queue: asyncio.Queue[tuple[int, T] | _End]
) -> None:
    end = _End()
    try:
        async with aclosing(source) as items:
            async for item in items:
                await queue.put((index, item))
    except Exception as error:
        end = _End(error)
    await queue.put(end)
