"""The thread that steps: requests come from any thread, events go to the loops that wait for them."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Literal

from harmonium.engine.protocol import FinishReason, Token, TokenEvent
from harmonium.engine.scheduler import Chunk, Progress, Scheduler, build_batch
from harmonium.engine.sequence import Advance, Sequence
from harmonium.engine.statistics import EngineStatistics
from harmonium.errors import EngineBusy, EngineClosed
from harmonium.model.batch import SampledToken, StepResult
from harmonium.model.runner import Runner

_log = logging.getLogger("harmonium.engine")


class Stream:
    """Events of one sequence on their way to the event loop that reads them."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()

    def push(self, event: TokenEvent) -> None:
        """Called in the loop. The queue is bounded by the answer's length."""
        self._events.put_nowait(event)

    async def next(self) -> TokenEvent:
        """The next event; what gathered while the reader was away comes as one."""
        event = await self._events.get()
        if self._events.empty():
            return event
        tokens = list(event.tokens)
        while not self._events.empty():
            event = self._events.get_nowait()
            tokens.extend(event.tokens)
        return TokenEvent(
            tuple(tokens), event.finish_reason, event.num_cached_tokens, event.error, event.began
        )


class _Job:
    """Work for the engine's thread, and the future of its end."""

    def __init__(self, work: Callable[[Scheduler], bool]) -> None:
        self._work = work
        self.done: Future[None] = Future()

    def try_once(self, scheduler: Scheduler) -> bool:
        """Whether it is over, well or with an exception."""
        try:
            if not self._work(scheduler):
                return False
        except Exception as error:
            self._settle(error)
        else:
            self._settle(None)
        return True

    def _settle(self, error: Exception | None) -> None:
        if not self.done.set_running_or_notify_cancel():
            return  # nobody waits any more
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


class Worker:
    """Owns scheduler and runner, and the thread that uses them.

    Other threads call `submit`, `abort` and `stop`, which hold the lock for a moment and never wait for a
    step.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, max_live: int) -> None:
        self.statistics = EngineStatistics()
        self._scheduler = scheduler
        self._runner = runner
        self._max_live = max_live
        self._changed = threading.Condition()
        # Guarded by _changed:
        self._streams: dict[Sequence, Stream] = {}
        self._arrived: list[Sequence] = []
        self._aborted: list[Sequence] = []
        self._jobs: list[_Job] = []
        self._state: Literal["open", "closing"] = "open"
        self._defect: BaseException | None = None
        # Of the thread alone:
        self._unfinished_jobs: list[_Job] = []
        self._finished: Counter[FinishReason] = Counter()
        self._num_steps = self._num_prefill_tokens = self._num_answer_tokens = self._num_forced_tokens = 0
        self._constraint_seconds = 0.0
        self._publish()
        self._thread = threading.Thread(target=self._run, name="harmonium-engine", daemon=True)
        self._thread.start()

    @property
    def runner(self) -> Runner:
        """What it steps; nobody else may."""
        return self._runner

    def check_open(self) -> None:
        """Raises EngineClosed, EngineBusy when a request could not be taken now."""
        with self._changed:
            self._check_open()

    def _check_open(self) -> None:
        if self._defect is not None:
            raise EngineClosed(f"the engine has stopped: {_describe(self._defect)}")
        if self._state != "open":
            raise EngineClosed("the engine is closed")
        if len(self._streams) >= self._max_live:
            raise EngineBusy(f"{len(self._streams):,} requests run or wait; the limit is {self._max_live:,}")

    def submit(self, sequence: Sequence, stream: Stream) -> None:
        """Queue a sequence. Raises EngineClosed, EngineBusy."""
        with self._changed:
            self._check_open()
            self._streams[sequence] = stream
            self._arrived.append(sequence)
            self._changed.notify()

    def abort(self, sequence: Sequence) -> None:
        """Its reader is gone: its blocks are free before the next step. Does nothing when it has ended."""
        with self._changed:
            if self._streams.pop(sequence, None) is not None:
                self._aborted.append(sequence)
                self._changed.notify()

    def between_steps(self, work: Callable[[Scheduler], bool]) -> Future[None]:
        """Do something on the engine's thread while no step is under way, again and again until it says True.

        It may change the runner, and look at the scheduler, which has taken in all that came before the call.
        What it raises, the future raises; an engine that closes first cancels it. Raises EngineClosed.
        """
        job = _Job(work)
        with self._changed:
            if self._defect is not None or self._state != "open":
                raise EngineClosed("the engine is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.done

    def stop(self) -> None:
        """End what runs with "aborted" after the step under way. Returns at once; `join` waits."""
        with self._changed:
            self._state = "closing"
            self._changed.notify()

    def join(self) -> None:
        """Wait until everything is given back."""
        if threading.current_thread() is not self._thread:  # the garbage collector may call from anywhere
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._receive():
                self._step()
        except BaseException as error:
            _log.exception("the engine has stopped")
            with self._changed:
                self._defect = error
        finally:
            self._end_all()
            self._runner.close()

    def _receive(self) -> bool:
        """Wait for work; take what came. False when the engine closes."""
        scheduler = self._scheduler
        self._try_jobs([])  # some wait for what the last step ended
        while True:
            with self._changed:
                while not (
                    self._arrived
                    or self._aborted
                    or self._jobs
                    or scheduler.has_work
                    or self._state == "closing"
                ):
                    self._changed.wait()
                arrived, self._arrived = self._arrived, []
                aborted, self._aborted = self._aborted, []
                jobs, self._jobs = self._jobs, []
                is_closing = self._state == "closing"
            for sequence in arrived:
                if sequence in aborted:
                    aborted.remove(sequence)
                    self._finished["aborted"] += 1
                else:
                    self._begin(sequence)
            for sequence in aborted:
                scheduler.remove(sequence)
                self._finished["aborted"] += 1
            self._try_jobs(jobs)
            if is_closing or scheduler.has_work:
                return not is_closing
            self._publish()

    def _try_jobs(self, more: list[_Job]) -> None:
        jobs = [*self._unfinished_jobs, *more]
        self._unfinished_jobs = [job for job in jobs if not job.try_once(self._scheduler)]

    def _begin(self, sequence: Sequence) -> None:
        """Queue a sequence; its constraint may have its first tokens, or its end, ready."""
        first = sequence.begin()
        self._num_forced_tokens += len(first.tokens)
        if first.finish_reason is None:
            self._scheduler.add(sequence)
        if first.tokens or first.finish_reason is not None:
            self._send([(sequence, _event(Progress(sequence, first)))])

    def _step(self) -> None:
        chunks = self._with_masks(self._scheduler.schedule())
        if not chunks:
            return
        self._num_steps += 1
        start = time.perf_counter()
        try:
            result = self._compute(chunks)
        except Exception as error:
            self._retry_alone(chunks, error)
            return
        self._keep_pace(chunks, time.perf_counter() - start)
        self._commit(chunks, result)

    def _keep_pace(self, chunks: list[Chunk], seconds: float) -> None:
        """Tell the pace what a step took that computed prompts while sequences waited for a token."""
        num_decoding = sum(chunk.sequence.num_pending == 1 for chunk in chunks)
        pace = self._scheduler.pace
        if pace is not None and 0 < num_decoding < len(chunks):
            pace.settle(sum(chunk.num_tokens for chunk in chunks) - num_decoding, seconds)

    def _with_masks(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks, those that get a token with their masks; one whose constraint raises ends alone."""
        constrained = [
            chunk for chunk in chunks if chunk.is_last and chunk.sequence.request.constraint is not None
        ]
        if not constrained:
            return chunks
        start = time.perf_counter()
        kept = {id(chunk): chunk.sequence.prepare_masks(chunk.draft) for chunk in constrained}
        self._constraint_seconds += time.perf_counter() - start
        masked: list[Chunk] = []
        for chunk in chunks:
            draft = kept.get(id(chunk), chunk.draft)
            if draft is not None:
                masked.append(replace(chunk, draft=draft))
            else:
                self._scheduler.remove(chunk.sequence)
                self._send([(chunk.sequence, _event(Progress(chunk.sequence, Advance((), "error"))))])
        return masked

    def _compute(self, chunks: list[Chunk]) -> StepResult:
        batch = build_batch(chunks, self._scheduler.cache)
        result = self._runner.step(batch)
        has_token = [token is not None for token in result.tokens]
        if has_token != [row is not None for row in batch.sampling]:
            raise RuntimeError(
                f"the runner answered {len(has_token)} rows; the step has {len(batch.sampling)}"
            )
        return result

    def _retry_alone(self, chunks: list[Chunk], error: Exception) -> None:
        """A step failed: compute its sequences one by one, so that one that cannot be computed ends alone.

        A step only writes what it would write again, so that to repeat it changes nothing.
        """
        _log.error("a step of %d sequences failed: %s", len(chunks), _describe(error), exc_info=error)
        for chunk in chunks:
            if len(chunks) > 1:
                try:
                    self._commit([chunk], self._compute([chunk]))
                    continue
                except Exception as alone:
                    error = alone
            self._scheduler.remove(chunk.sequence)
            event = TokenEvent((), "error", chunk.sequence.num_cached_tokens or 0, _describe(error))
            self._send([(chunk.sequence, event)])

    def _commit(self, chunks: list[Chunk], result: StepResult) -> None:
        self._num_prefill_tokens += sum(
            max(0, min(chunk.num_tokens, chunk.sequence.num_prompt - chunk.sequence.num_computed))
            for chunk in chunks
        )
        progress = self._scheduler.commit(chunks, result)
        for item in progress:
            self._num_answer_tokens += len(item.advance.tokens) - item.advance.num_forced
            self._num_forced_tokens += item.advance.num_forced
        self._send([(item.sequence, _event(item)) for item in progress])

    def _send(self, events: list[tuple[Sequence, TokenEvent]]) -> None:
        """Hand events over, with one call for each loop. A reader that is gone gets none."""
        events_of: dict[asyncio.AbstractEventLoop, list[tuple[Sequence, Stream, TokenEvent]]] = {}
        with self._changed:
            for sequence, event in events:
                stream = self._streams.get(sequence)
                if stream is not None:
                    events_of.setdefault(stream.loop, []).append((sequence, stream, event))
                    if event.finish_reason is not None:
                        del self._streams[sequence]
                        self._finished[event.finish_reason] += 1
                elif event.finish_reason is not None and sequence in self._aborted:
                    # It ended in the step in which its reader left.
                    self._aborted.remove(sequence)
                    self._finished["aborted"] += 1
        self._publish()  # before a reader can look: who has its last event sees its blocks given back
        for loop, items in events_of.items():
            self._hand_over(loop, items)

    def _hand_over(
        self, loop: asyncio.AbstractEventLoop, items: list[tuple[Sequence, Stream, TokenEvent]]
    ) -> None:
        try:
            loop.call_soon_threadsafe(_push_all, [(stream, event) for _, stream, event in items])
        except RuntimeError:  # the loop was closed under its readers
            for sequence, _, _ in items:
                self.abort(sequence)

    def _end_all(self) -> None:
        """End every request that is left, then say what is left of the engine."""
        with self._changed:
            self._state = "closing"
            left = list(self._streams)
            self._finished["aborted"] += len(self._aborted)
            self._arrived.clear()
            self._aborted.clear()
            jobs, self._jobs = [*self._unfinished_jobs, *self._jobs], []
            defect = self._defect
        if defect is None:  # else the books may be wrong, and nobody will take a block again
            for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
                self._scheduler.remove(sequence)
        for job in jobs:
            job.done.cancel()
        reason: FinishReason = "aborted" if defect is None else "error"
        error = None if defect is None else _describe(defect)
        self._send([(s, TokenEvent((), reason, s.num_cached_tokens or 0, error)) for s in left])

    def _publish(self) -> None:
        scheduler, cache = self._scheduler, self._scheduler.cache
        self.statistics = EngineStatistics(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            full_blocks_free=cache.full.num_free,
            full_blocks_cached=cache.full.num_cached,
            full_blocks_used=cache.full.num_used,
            window_blocks_free=cache.windowed.num_free,
            window_blocks_cached=cache.windowed.num_cached,
            window_blocks_used=cache.windowed.num_used,
            num_steps=self._num_steps,
            num_prefill_tokens=self._num_prefill_tokens,
            num_answer_tokens=self._num_answer_tokens,
            num_forced_tokens=self._num_forced_tokens,
            constraint_seconds=self._constraint_seconds,
            num_cached_tokens=scheduler.num_cached_tokens,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            num_restored_blocks=cache.num_restored,
            num_drafts=scheduler.num_drafts,
            num_draft_tokens=scheduler.num_draft_tokens,
            num_accepted_draft_tokens=scheduler.num_accepted_draft_tokens,
            experts=getattr(self._runner, "expert_counts", None),  # not every runner streams
            finished=dict(+self._finished),
        )


def _push_all(items: list[tuple[Stream, TokenEvent]]) -> None:
    for stream, event in items:
        stream.push(event)


def _event(progress: Progress) -> TokenEvent:
    sequence, advance = progress.sequence, progress.advance
    tokens = tuple(_token(token) for token in advance.tokens)
    if sequence.error is not None and advance.finish_reason == "error":
        _log.error("a constraint failed: %s", _describe(sequence.error), exc_info=sequence.error)
    error = None if sequence.error is None else _describe(sequence.error)
    return TokenEvent(tokens, advance.finish_reason, sequence.num_cached_tokens or 0, error, sequence.began)


def _token(token: SampledToken) -> Token:
    return Token(token.token_id, token.logprob, token.top_logprobs)


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
