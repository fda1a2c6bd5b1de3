"""Speed of an engine, whichever it is: seconds until a prompt's first token, tokens a second while decoding.

Prompts are random token ids, so that no prefix is found in a cache, and stop tokens do not stop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from harmonium.engine.protocol import Engine, Request
from harmonium.errors import EngineError
from harmonium.model.batch import SamplingParams


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """Some steps that gave each of num_sequences sequences the same number of tokens.

    context: tokens of a sequence, prompt and answer, in the middle of the window, averaged over sequences.
    """

    num_sequences: int
    num_tokens: int
    seconds: float
    context: float

    @property
    def tokens_per_second(self) -> float:
        """Of all sequences together."""
        return self.num_tokens / self.seconds


class Meter:
    """Sends requests to an engine and takes the time. rng: where the prompts come from."""

    def __init__(self, engine: Engine, rng: np.random.Generator) -> None:
        self._engine = engine
        self._rng = rng
        self._num_requests = 0

    async def prefill_seconds(self, num_tokens: int) -> float:
        """From the request to its first token, for one prompt of num_tokens.

        Raises what the engine raises, EngineError when it gives no token.
        """
        request = self._request(num_tokens, max_tokens=1)
        start = time.perf_counter()
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                if event.tokens:
                    return time.perf_counter() - start
                _raise_ended(event.error)
        raise EngineError("the engine ended a request without a token")

    async def decode(
        self,
        batches: Sequence[int],
        depth: int,
        num_tokens: int,
        repetitions: int,
        progress: Callable[[int], None] = lambda batch: None,
    ) -> list[DecodeWindow]:
        """`repetitions` windows of num_tokens a sequence for each number of sequences, most sequences first.

        All sequences start with a prompt of `depth` tokens (one where depth is 0) and are filled once: to
        measure a smaller batch, some are ended, and the others have grown by then. progress is told the batch
        before its windows. Raises what the engine raises, EngineError when a sequence ends early.
        """
        sizes = sorted(set(batches), reverse=True)
        streams = [_Stream(self._engine, self._request(max(1, depth))) for _ in range(sizes[0])]
        windows: list[DecodeWindow] = []
        try:
            for batch in sizes:
                for stream in streams[batch:]:
                    await stream.close()
                streams = streams[:batch]
                progress(batch)
                windows += [await _window(streams, num_tokens) for _ in range(repetitions)]
        finally:
            for stream in streams:
                await stream.close()
        return windows

    def _request(self, num_tokens: int, max_tokens: int | None = None) -> Request:
        self._num_requests += 1
        token_ids = self._rng.integers(0, self._engine.info.vocabulary_size, num_tokens).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_stop=True)
        return Request(f"meter-{self._num_requests}", tuple(token_ids), sampling)


class _Stream:
    """A request that runs until closed, and how many tokens it has given."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.num_prompt = len(request.token_ids)
        self.count = 0
        self._reached = asyncio.Condition()
        self._error: Exception | None = None
        self._task = asyncio.create_task(self._read(engine, request))

    async def _read(self, engine: Engine, request: Request) -> None:
        try:
            async with aclosing(engine.generate(request)) as events:
                async for event in events:
                    async with self._reached:
                        self.count += len(event.tokens)
                        self._reached.notify_all()
                    if event.finish_reason is not None:
                        _raise_ended(event.error)
                        raise EngineError(
                            f"a sequence ended ({event.finish_reason}) after {self.count:,} tokens while "
                            f"it was measured; the context of {engine.info.context_length:,} may be too short"
                        )
        except Exception as error:
            async with self._reached:
                self._error = error
                self._reached.notify_all()

    async def reach(self, count: int) -> None:
        async with self._reached:
            await self._reached.wait_for(lambda: self.count >= count or self._error is not None)
        if self._error is not None:
            raise self._error

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _window(streams: Sequence[_Stream], num_tokens: int) -> DecodeWindow:
    """From the moment at which every sequence has one token more to that at which each has num_tokens more.

    Both are ends of a step, and the slowest sequence says which, so that nothing of a prefill is inside.
    """
    await _grow(streams, 1)
    middle = np.mean([stream.num_prompt + stream.count + num_tokens / 2 for stream in streams])
    start = time.perf_counter()
    await _grow(streams, num_tokens)
    seconds = time.perf_counter() - start
    return DecodeWindow(len(streams), num_tokens * len(streams), seconds, float(middle))


async def _grow(streams: Sequence[_Stream], num_tokens: int) -> None:
    """Wait until each sequence has num_tokens more than now."""
    await asyncio.gather(*[stream.reach(stream.count + num_tokens) for stream in streams])


def _raise_ended(error: str | None) -> None:
    if error is not None:
        raise EngineError(f"the engine failed while it was being measured: {error}")
