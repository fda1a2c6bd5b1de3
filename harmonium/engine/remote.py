"""RemoteEngine: the Engine seam over vLLM servers; they compute, everything else stays here.

    engine = await connect(["http://a:8000", "http://b:8000"], "openai/gpt-oss-120b")

Whatever parallelism vLLM was started with (tensor, pipeline, expert, data, many nodes) is its own matter.
docs/vllm.md says what is passed on, how constraints are kept and what happens when an upstream goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from harmonium.engine.admission import check_request, refuse_begun_answer
from harmonium.engine.balance import Balancer, prefix_hashes
from harmonium.engine.guided import Answer, GuidedAnswer
from harmonium.engine.protocol import EngineInfo, Request, Token, TokenEvent
from harmonium.engine.upstream import (
    BrokenError,
    RemoteSettings,
    Upstream,
    UpstreamStatistics,
    is_worth_another,
)
from harmonium.engine.vllm_wire import Call, Chunk, LostError, RefusedError
from harmonium.errors import EngineBusy, EngineClosed, HarmoniumError, UpstreamUnavailable

_log = logging.getLogger("harmonium.engine")


@dataclass(slots=True)
class RemoteStatistics:
    """What the engine did. retries: requests sent to another upstream before their first token. resumed:
    answers whose upstream went away and that went on elsewhere. corrections: times that an answer left its
    grammar and was put right. upstreams: one by one.
    """

    retries: int = 0
    resumed: int = 0
    corrections: int = 0
    upstreams: tuple[UpstreamStatistics, ...] = field(default=())


class RemoteEngine:
    """Serves requests from any number of event loops by asking upstreams. Closes no upstream."""

    def __init__(
        self, upstreams: Sequence[Upstream], info: EngineInfo, settings: RemoteSettings | None = None
    ) -> None:
        """info.model_name: as the upstreams call it. The upstreams' own flags say which of them are up;
        `watch` keeps the flags true.
        """
        self._upstreams = tuple(upstreams)
        self._balancer = Balancer()
        self._info = info
        self._settings = settings or RemoteSettings()
        self._statistics = RemoteStatistics()
        self._is_closed = False
        self._watchers: list[asyncio.Task[None]] = []
        self._closers: list[Callable[[], Awaitable[None]]] = []

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def statistics(self) -> RemoteStatistics:
        """A copy of the counts as they are now."""
        counts = self._statistics
        each = tuple(upstream.statistics for upstream in self._upstreams)
        return RemoteStatistics(counts.retries, counts.resumed, counts.corrections, each)

    def admit(self, request: Request) -> None:
        """Check that the request can be served now.

        Raises PromptTooLong, RequestError; UpstreamUnavailable while no upstream is up; EngineClosed.
        """
        check_request(request, self._info)
        refuse_begun_answer(request, "vLLM")
        if self._is_closed:
            raise EngineClosed("the engine is closed")
        if not any(upstream.is_up for upstream in self._upstreams):
            raise self._nobody(None)

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Continue a sequence: events until one has a finish_reason. Closing the generator closes the
        upstream's request.

        Before the first token another upstream is tried where one fails; after it an answer whose upstream
        went away goes on elsewhere, once, behind the tokens that are here. Raises what `admit` raises;
        UpstreamError where that fails too, and where an upstream is silent for too long or sends what is no
        stream of tokens.
        """
        self.admit(request)
        room = self._info.context_length - len(request.token_ids)
        limit = request.sampling.max_tokens
        room = room if limit is None else min(room, limit)
        answer: Answer | GuidedAnswer
        if request.constraint is None:
            answer = Answer(request, room, self._model_of(request))
        else:
            answer = GuidedAnswer(request, room, self._model_of(request), self._settings.max_corrections)
        try:
            async with aclosing(answer.events(self._stream)) as events:
                async for event in events:
                    yield event
        except HarmoniumError:
            if not self._is_closed:
                raise
            yield TokenEvent((), "aborted")
        finally:
            self._statistics.resumed += answer.num_resumed
            if isinstance(answer, GuidedAnswer):
                self._statistics.corrections += answer.num_corrections

    def _model_of(self, request: Request) -> str:
        """vLLM takes a LoRA adapter's name for a model's."""
        return request.adapter or self._info.model_name

    async def _stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        """The chunks of one call, from whichever upstream gives the first of them."""
        tried: list[Upstream] = []
        failure: HarmoniumError | None = None
        blocks = prefix_hashes(call.token_ids, f"{call.model}/{call.cache_salt}")
        while True:
            if self._is_closed:
                raise EngineClosed("the engine is closed")
            upstream = self._balancer.choose(self._upstreams, blocks, tried)
            if upstream is None:
                raise failure or self._nobody(None)
            self._statistics.retries += bool(tried)
            tried.append(upstream)
            has_begun = False
            try:
                with upstream.working():
                    async with aclosing(upstream.ask(call, self._info.vocabulary_size)) as chunks:
                        async for chunk in chunks:
                            if self._is_closed:  # it was connecting when the others were cut off
                                raise EngineClosed("the engine is closed")
                            has_begun = has_begun or bool(chunk.tokens)
                            yield chunk
                return
            except (BrokenError, RefusedError) as error:
                failure = self._failure(upstream, error)
                is_lost = isinstance(error, RefusedError) and not is_worth_another(error)
            if has_begun or is_lost:
                raise failure

    def _failure(self, upstream: Upstream, error: BrokenError | RefusedError) -> HarmoniumError:
        """Note what went wrong; what the client is told if nobody else serves it."""
        if self._is_closed:
            return EngineClosed("the engine is closed")
        if isinstance(error, BrokenError):
            upstream.failures += 1
            _log.warning("%s: %s", upstream.address.text, error)
            if error.is_down:
                upstream.eject(str(error))
                return self._nobody(error)
            upstream.rest(self._settings.rest_seconds)
            return LostError("the server that computes for us broke off")
        if error.status >= 500:
            upstream.failures += 1
            _log.warning("%s: %d: %s", upstream.address.text, error.status, error)
        if error.status in (429, 503):
            upstream.rest(error.retry_after or self._settings.rest_seconds)
            if error.status == 429:
                return EngineBusy("vLLM is busy", error.retry_after or 1.0)
            return UpstreamUnavailable("vLLM takes no more requests now")
        return error.as_error()

    def _nobody(self, error: BrokenError | None) -> UpstreamUnavailable:
        """Addresses stay in the log: clients are strangers."""
        return UpstreamUnavailable("no vLLM server can be reached now" if error is None else "vLLM is down")

    async def score(
        self, token_ids: tuple[int, ...], num_top: int, adapter: str | None = None
    ) -> tuple[Token, ...]:
        """As PromptScorer says, by vLLM's `prompt_logprobs`. Raises what `generate` raises."""
        self.admit(Request("score", token_ids, adapter=adapter))
        tried: list[Upstream] = []
        failure: HarmoniumError | None = None
        blocks = prefix_hashes(token_ids, "score")
        while (upstream := self._balancer.choose(self._upstreams, blocks, tried)) is not None:
            tried.append(upstream)
            try:
                with upstream.working():
                    return await upstream.score(adapter or self._info.model_name, token_ids, num_top)
            except (BrokenError, RefusedError) as error:
                failure = self._failure(upstream, error)
                if isinstance(error, RefusedError) and not is_worth_another(error):
                    break
        raise failure or self._nobody(None)

    def watch(self) -> None:
        """From now on look at every upstream's health, in the running loop, until `close`."""
        loop = asyncio.get_running_loop()
        self._watchers = [loop.create_task(self._watch(upstream)) for upstream in self._upstreams]

    async def _watch(self, upstream: Upstream) -> None:
        """Out after two looks that found it ill; back after one that finds it well and with our model."""
        num_bad = 0
        while True:
            await asyncio.sleep(self._settings.check_seconds)
            why = await self._why_not(upstream)
            if why is None:
                num_bad = 0
                upstream.admit()
            else:
                num_bad += 1
                if num_bad >= 2 or not upstream.is_up:
                    upstream.eject(why)

    async def _why_not(self, upstream: Upstream) -> str | None:
        """Why it cannot serve; None where it can."""
        try:
            if not await upstream.is_healthy():
                return "its /health is not 200"
            return None if upstream.is_up else await self._mismatch(upstream)
        except (BrokenError, RefusedError, HarmoniumError) as error:
            return str(error)

    async def _mismatch(self, upstream: Upstream) -> str | None:
        for card in await upstream.models():
            if card.name == self._info.model_name:
                length = card.max_model_len or self._info.context_length
                if length >= self._info.context_length:
                    return None
                return f"its context is {length:,}, not {self._info.context_length:,}"
        return f"it does not serve {self._info.model_name!r}"

    def on_close(self, closer: Callable[[], Awaitable[None]]) -> None:
        """Call this at the end of `close`: for an upstream that is ours."""
        self._closers.append(closer)

    async def close(self) -> None:
        """End running requests with "aborted" and let go of the upstreams. A second call does nothing."""
        self._is_closed = True
        for upstream in self._upstreams:
            upstream.cut_off()
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.cancel()
        for watcher in watchers:
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
        while self._closers:
            await self._closers.pop()()
