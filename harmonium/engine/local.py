"""LocalEngine: many requests share one model in this process."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Sequence_
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from harmonium.checkpoint.model_config import ModelConfig
from harmonium.config import CACHE_BLOCK_TOKENS, EngineConfig, LoraSource
from harmonium.engine.adapter_updates import AdapterUpdates
from harmonium.engine.adapters import AdapterTable, ServedAdapter
from harmonium.engine.admission import check_adapter, check_request, check_token_ids
from harmonium.engine.blocks import BlockCopier, PagedCache
from harmonium.engine.disk import BlockFiles, RunnerBlocks, StoredBlocks
from harmonium.engine.drafts import PromptLookup, decode_cost
from harmonium.engine.pace import PrefillPace
from harmonium.engine.protocol import EngineInfo, Request, Token, TokenEvent
from harmonium.engine.scheduler import Scheduler
from harmonium.engine.scores import PromptScores
from harmonium.engine.sequence import LogitsSink, Sequence
from harmonium.engine.statistics import EngineStatistics
from harmonium.engine.worker import Stream, Worker
from harmonium.errors import ConfigError, EngineClosed, EngineError, PromptTooLong, RequestError
from harmonium.model.runner import Runner

LOGITS_CHUNK_TOKENS = 16
"""Tokens of a step whose logits are returned: each row is a float32 for every token of the vocabulary."""


class LocalEngine:
    """Serves requests from any number of threads and event loops with one Runner.

    A thread of its own steps the model from the first request to `close`. An engine that is dropped without
    `close` closes itself.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        model_name: str,
        context_length: int,
        num_full_blocks: int,
        num_window_blocks: int,
        config: EngineConfig | None = None,
        adapters: Sequence_[ServedAdapter] = (),
        block_files: BlockFiles | None = None,
        adapter_limit_bytes: int | None = None,
    ) -> None:
        """Take over a runner whose cache is allocated with these numbers of blocks; `close` closes it.

        context_length: prompt plus answer, in tokens. config: max_sequences, max_batch_tokens (cut to the
        runner's), max_queue, prefix_cache, speculation and stall_seconds are read; None: the defaults.
        adapters: those that the runner holds, and what requests call them. block_files: where computed
        prefixes are kept on disk, for a runner whose blocks can be read (RunnerBlocks); closed with it.
        adapter_limit_bytes: what adapters may take when more are loaded; None: any amount.

        Raises ConfigError when the cache could not hold one sequence of context_length tokens.
        """
        config = config or EngineConfig()
        storage = None if block_files is None else StoredBlocks(block_files, _with_blocks(runner))
        copier = runner if isinstance(runner, BlockCopier) else None
        cache = _make_cache(
            runner.config, context_length, num_full_blocks, num_window_blocks, config, storage, copier
        )
        scheduler = Scheduler(
            cache,
            config.max_sequences,
            min(config.max_batch_tokens, runner.max_batch_tokens),
            PromptLookup() if config.speculation == "ngram" else None,
            decode_cost(runner.config, getattr(runner, "expert_counts", None) is not None),
            PrefillPace(config.stall_seconds, config.max_batch_tokens) if config.stall_seconds else None,
        )
        self._adapters = AdapterTable(adapters)
        self._info = EngineInfo(
            model_name, context_length, runner.config.vocabulary_size, "local", self._adapters.names
        )
        self._worker = Worker(scheduler, runner, config.max_sequences + config.max_queue)
        self._updates = AdapterUpdates(self._adapters, self._worker, runner, adapter_limit_bytes)
        self._files = block_files
        self._finalizer = weakref.finalize(self, _shut_down, self._worker, block_files)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def statistics(self) -> EngineStatistics:
        """What the engine holds and did, as of its last step."""
        return self._worker.statistics

    def admit(self, request: Request) -> None:
        """Check that the request can be served now. Nothing is reserved.

        Raises PromptTooLong, RequestError for a request that could never be served; EngineBusy when
        max_sequences + max_queue requests are here already; EngineClosed.
        """
        check_request(request, self._info)
        self._worker.check_open()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Continue a sequence: events until one has a finish_reason. Closing the generator aborts the
        request.

        The request is queued when the first event is asked for; that raises what `admit` raises. A reader
        that is slower than the model gets several tokens in an event.
        """
        check_request(request, self._info)
        async with aclosing(self._events(request)) as events:
            async for event in events:
                yield event

    async def _events(
        self, request: Request, logits_chunk: int = 0, sink: LogitsSink | None = None
    ) -> AsyncGenerator[TokenEvent, None]:
        stream = Stream()
        with self._adapters.using(request.adapter) as adapter:
            sequence = Sequence(request, self._info.context_length, logits_chunk, sink, adapter)
            self._worker.submit(sequence, stream)
        try:
            while True:
                event = await stream.next()
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            self._worker.abort(sequence)

    async def logits(self, token_ids: tuple[int, ...], adapter: str | None = None) -> npt.NDArray[np.float32]:
        """Logits after each of T tokens, float32 [T, V]; nothing is sampled and no cached prefix is used.

        Waits its turn among the other requests. The result takes 4 * T * V bytes. adapter: the LoRA adapter
        to compute with.

        Raises PromptTooLong for more than context_length tokens, RequestError for none or one outside the
        vocabulary and for an adapter that is not there, EngineBusy, EngineClosed, EngineError.
        """
        pieces: list[npt.NDArray[np.float32]] = []
        await self._read_logits(token_ids, pieces, adapter)
        return np.concatenate(pieces)

    async def score(
        self, token_ids: tuple[int, ...], num_top: int, adapter: str | None = None
    ) -> tuple[Token, ...]:
        """As PromptScorer says: float32 log-softmax of the logits, at most 16 rows of which exist at a time.

        Raises what `logits` raises.
        """
        scores = PromptScores(token_ids, num_top)
        await self._read_logits(token_ids, scores, adapter)
        return scores.tokens

    async def _read_logits(self, token_ids: tuple[int, ...], sink: LogitsSink, adapter: str | None) -> None:
        check_adapter(adapter, self._info)
        if not token_ids:
            raise RequestError("token_ids is empty; expected at least one token")
        if len(token_ids) > self._info.context_length:
            raise PromptTooLong(
                f"token_ids has {len(token_ids):,} tokens; the context is {self._info.context_length:,}"
            )
        check_token_ids(token_ids, self._info.vocabulary_size, "token_ids")
        request = Request("logits", token_ids, adapter=adapter)
        async with aclosing(self._events(request, LOGITS_CHUNK_TOKENS, sink)) as events:
            async for event in events:
                if event.finish_reason == "error":
                    raise EngineError(event.error or "the step failed")
                if event.finish_reason == "aborted":
                    raise EngineClosed("the engine was closed before the logits were computed")

    async def wait_until_resident(self) -> None:
        """Return when weights are where they stay: files read, experts packed. Steps need not wait."""
        wait = getattr(self._worker.runner, "wait_until_resident", None)  # not every runner has work left
        if wait is not None:
            await asyncio.to_thread(wait)

    async def load_adapter(self, source: LoraSource) -> None:
        """Serve one more LoRA adapter, as AdapterHost says. Steps go on while it is read."""
        try:
            await self._updates.load(source)
        finally:
            self._info = replace(self._info, adapters=self._adapters.names)

    async def unload_adapter(self, name: str) -> None:
        """Take no more requests for an adapter; its memory is given back when the last of them is over."""
        await self._updates.unload(name)
        self._info = replace(self._info, adapters=self._adapters.names)

    async def close(self) -> None:
        """End running requests with "aborted", then thread and runner. A second call does nothing."""
        self._worker.stop()
        await asyncio.to_thread(self._worker.join)
        if self._files is not None:
            await asyncio.to_thread(self._files.close)
        self._finalizer.detach()


def _make_cache(
    model: ModelConfig,
    context_length: int,
    num_full_blocks: int,
    num_window_blocks: int,
    config: EngineConfig,
    storage: StoredBlocks | None,
    copier: BlockCopier | None,
) -> PagedCache:
    window = model.window
    if "window" not in model.layer_kinds:
        # No layer reads a window block: the books get a pool that never runs out before the other.
        window, num_window_blocks = 1, num_full_blocks
    cache = PagedCache(
        num_full_blocks,
        num_window_blocks,
        block_tokens=CACHE_BLOCK_TOKENS,
        window=window,
        max_sequences=config.max_sequences,
        max_tokens=context_length,
        prefix_cache=config.prefix_cache,
        storage=storage,
        copier=copier,
    )
    least_full = -(-context_length // CACHE_BLOCK_TOKENS)
    least_window = min(least_full, cache.window_blocks_before + 1)
    for name, value, least in (
        ("num_full_blocks", num_full_blocks, least_full),
        ("num_window_blocks", num_window_blocks, least_window),
    ):
        if value < least:
            raise ConfigError(
                f"{name} is {value:,}; one sequence of {context_length:,} tokens needs {least:,} "
                f"blocks of {CACHE_BLOCK_TOKENS} tokens"
            )
    return cache


def _with_blocks(runner: Runner) -> RunnerBlocks:
    if not isinstance(runner, RunnerBlocks):
        raise ConfigError(
            f"a cache folder needs a runner whose blocks can be read; {type(runner).__name__} is none"
        )
    return runner


def _shut_down(worker: Worker, files: BlockFiles | None) -> None:
    worker.stop()
    worker.join()
    if files is not None:
        files.close()
