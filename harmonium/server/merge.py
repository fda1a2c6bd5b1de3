"""Several streams as one, each item as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


async def merge(sources: Sequence[AsyncIterable[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the source, item) until all sources have ended; what one raises ends all.

    Sources are read one item ahead at most, so a slow reader slows them all.
    """
    if len(sources) == 1:
        async for item in sources[0]:
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


async def _read(index: int, source: AsyncIterable[T], queue: asyncio.Queue[tuple[int, T] | _End]) -> None:
    end = _End()
    try:
        async for item in source:
            await queue.put((index, item))
    except Exception as error:
        end = _End(error)
    await queue.put(end)
