"""Answers of replicas that die, are full, shut down or are left, without Ray: a handle over real engines."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from harmonium.engine import LocalEngine, Request, TokenEvent
from harmonium.engine.protocol import EngineInfo, PromptScorer
from harmonium.engine.ray_engine import MAX_RETRIED, RayEngine, ReplicaLost, Route
from harmonium.errors import EngineBusy, EngineClosed, EngineError, PromptTooLong, RequestError
from harmonium.model.batch import SamplingParams
from tests.engine.fake_runner import FakeRunner
from tests.engine.serving import answer, check_empty, greedy, make_engine, prompt_of, wait_until

INFO = EngineInfo("fake", 1024, 97, "local")


class DiedError(Exception):
    """What Ray would raise."""


def read_error(error: Exception) -> Exception:
    return ReplicaLost("the replica that computed this died") if isinstance(error, DiedError) else error


@dataclass
class Fate:
    """What becomes of one call. dies_at: after so many tokens. raises: instead of its first event.
    hangs_at: nothing more comes after so many tokens. shuts_down_at: it ends "aborted", or is cancelled.
    """

    dies_at: int | None = None
    raises: Exception | None = None
    hangs_at: int | None = None
    shuts_down_at: int | None = None
    is_cancelled: bool = False


@dataclass
class FakeHandle:
    """Calls an engine, one fate after the other; those after the last go well."""

    engine: LocalEngine
    fates: list[Fate] = field(default_factory=list)
    calls: list[Request] = field(default_factory=list)
    responses: list[FakeStream] = field(default_factory=list)

    def options(self, *, method_name: str, stream: bool) -> FakeMethod:
        assert stream is (method_name == "generate")
        return FakeMethod(self, method_name)


@dataclass
class FakeMethod:
    handle: FakeHandle
    name: str

    def remote(self, *arguments: Any) -> Any:
        handle = self.handle
        fate = handle.fates.pop(0) if handle.fates else Fate()
        *arguments, route = pickle.loads(pickle.dumps(arguments))
        assert isinstance(route, Route) and not route.blocks
        if self.name == "score":
            return FakeValue(handle.engine.score(*arguments), fate)
        handle.calls.append(arguments[0])
        handle.responses.append(FakeStream(handle.engine, arguments[0], fate))
        return handle.responses[-1]


class FakeValue:
    def __init__(self, value: Awaitable[Any], fate: Fate) -> None:
        self._value, self._fate = value, fate

    def __await__(self) -> Generator[Any, None, Any]:
        if self._fate.raises is not None:
            self._value.close()  # type: ignore[attr-defined]
            raise self._fate.raises
        return self._value.__await__()

    def cancel(self) -> None:
        pass


class FakeStream:
    """As Ray's DeploymentResponseGenerator: it is iterated and cancelled, never closed. A token an event."""

    def __init__(self, engine: LocalEngine, request: Request, fate: Fate) -> None:
        self._events = engine.generate(request)
        self._fate = fate
        self._num_tokens = 0
        self._pending: list[TokenEvent] = []
        self.is_cancelled = False
        self._closing: asyncio.Task[None] | None = None

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        fate = self._fate
        if fate.raises is not None:
            raise fate.raises
        if fate.dies_at is not None and self._num_tokens >= fate.dies_at:
            raise DiedError
        if fate.shuts_down_at is not None and self._num_tokens >= fate.shuts_down_at:
            if fate.is_cancelled:
                raise asyncio.CancelledError
            return TokenEvent((), "aborted")
        if fate.hangs_at is not None and self._num_tokens >= fate.hangs_at:
            await asyncio.Event().wait()
        if not self._pending:
            event = replace(await self._events.__anext__(), began=-0.5)
            self._pending = [replace(event, tokens=(token,), finish_reason=None) for token in event.tokens]
            self._pending[-1:] = [replace(event, tokens=event.tokens[-1:])]
        self._num_tokens += len(self._pending[0].tokens)
        return self._pending.pop(0)

    def cancel(self) -> None:
        self.is_cancelled = True
        self._closing = asyncio.ensure_future(self._events.aclose())


def play(
    *fates: Fate,
    request: Request | None = None,
    runner: FakeRunner | None = None,
    work: Callable[[RayEngine, FakeHandle], Awaitable[Any]] | None = None,
) -> tuple[Any, FakeHandle, RayEngine]:
    """What `work` gives, or the answer's tokens; afterwards the replica has every block back."""
    request = request or greedy(prompt_of(150), 20)

    async def run() -> tuple[Any, FakeHandle, RayEngine]:
        replica = make_engine(runner)
        handle = FakeHandle(replica, list(fates))
        engine = RayEngine(handle, INFO, read_error)
        try:
            result = await (work(engine, handle) if work else answer(engine, request))  # type: ignore[arg-type]
            await asyncio.to_thread(wait_until, lambda: replica.statistics.running == 0, 60)
        finally:
            await engine.close()
            await replica.close()
        check_empty(replica)
        return result, handle, engine

    return asyncio.run(run())


SAMPLED = Request(
    "r", tuple(prompt_of(150)), SamplingParams(temperature=1.0, max_tokens=20, presence_penalty=0.5)
)


@pytest.mark.parametrize("num_lost", [1, MAX_RETRIED])
def test_a_replica_that_dies_before_the_first_token_is_not_noticed(num_lost: int) -> None:
    whole, *_ = play()
    tokens, handle, engine = play(*[Fate(dies_at=0)] * num_lost)
    assert tokens == whole and len(handle.calls) == num_lost + 1
    assert (engine.statistics.retries, engine.statistics.resumed) == (num_lost, 0)


@pytest.mark.parametrize("place", range(1, 20))
def test_a_replica_that_dies_in_mid_answer_is_not_noticed(place: int) -> None:
    whole, *_ = play()
    tokens, handle, engine = play(Fate(dies_at=place))
    assert tokens == whole
    assert handle.calls[1].answer_token_ids == tuple(whole[:place])
    assert (engine.statistics.retries, engine.statistics.resumed) == (0, 1)


def test_without_a_seed_the_front_draws_one_that_all_replicas_get() -> None:
    tokens, handle, _ = play(Fate(dies_at=0), Fate(dies_at=7), request=SAMPLED)
    first, second, third = handle.calls
    assert first.sampling.seed is not None
    assert first.sampling == second.sampling == third.sampling
    again, *_ = play(request=replace(SAMPLED, sampling=first.sampling))
    assert tokens == again and len(tokens) == 20
    assert play(request=SAMPLED)[1].calls[0].sampling.seed != first.sampling.seed


def test_an_answer_goes_on_elsewhere_once_and_then_ends_with_an_error() -> None:
    async def collect(engine: RayEngine, handle: FakeHandle) -> list[TokenEvent]:
        return [event async for event in engine.generate(greedy(prompt_of(150), 20))]

    events, handle, _ = play(Fate(dies_at=5), Fate(dies_at=3), work=collect)
    assert events[-1].finish_reason == "error" and events[-1].error == "the replica that computed this died"
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert len(handle.calls) == 2


def test_a_request_that_kills_every_replica_is_given_up() -> None:
    with pytest.raises(ReplicaLost) as caught:
        play(*[Fate(dies_at=0)] * 9)
    assert caught.value.status == 503


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("is_cancelled", [True, False])
def test_a_replica_that_shuts_down_is_left_for_another(place: int, is_cancelled: bool) -> None:
    whole, *_ = play()
    assert play(Fate(shuts_down_at=place, is_cancelled=is_cancelled))[0] == whole


@pytest.mark.parametrize(
    "error", [EngineBusy("many wait", 7.0), EngineError("the grammar failed"), ZeroDivisionError("ours")]
)
def test_what_a_replica_raises_is_raised_here(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        play(Fate(raises=error))
    assert caught.value is error


def test_a_replica_of_other_settings_that_refuses_is_left_for_another() -> None:
    whole, *_ = play()
    assert play(Fate(raises=PromptTooLong("its context is shorter")))[0] == whole
    with pytest.raises(PromptTooLong):
        play(*[Fate(raises=PromptTooLong("its context is shorter"))] * 9)


def test_requests_are_checked_before_they_are_sent() -> None:
    async def refused(engine: RayEngine, handle: FakeHandle) -> None:
        with pytest.raises(PromptTooLong):
            engine.admit(greedy([1] * 1024))
        with pytest.raises(RequestError, match="expected 0 to 96"):
            await answer(engine, greedy([97]))  # type: ignore[arg-type]
        assert not handle.calls

    play(work=refused)


@pytest.mark.parametrize("hangs_at", [None, 0, 3])
def test_closing_the_generator_cancels_the_call(hangs_at: int | None) -> None:
    async def leave(engine: RayEngine, handle: FakeHandle) -> bool:
        events = engine.generate(greedy(prompt_of(50), None))
        if hangs_at == 0:
            task = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
        else:
            await anext(events)
        await events.aclose()
        return handle.responses[0].is_cancelled and not engine._waiting

    is_cancelled, *_ = play(Fate(hangs_at=hangs_at), runner=FakeRunner(seconds_per_step=0.002), work=leave)
    assert is_cancelled


def test_closing_the_engine_ends_what_runs_with_aborted() -> None:
    async def close(engine: RayEngine, handle: FakeHandle) -> list[TokenEvent]:
        events: list[TokenEvent] = []

        async def read() -> None:
            events.extend([event async for event in engine.generate(greedy(prompt_of(50), None))])

        reading = asyncio.ensure_future(read())
        while not handle.responses or not handle.responses[0]._num_tokens:
            await asyncio.sleep(0.001)
        await engine.close()
        await reading
        with pytest.raises(EngineClosed):
            engine.admit(greedy([1]))
        return events

    events, handle, _ = play(Fate(hangs_at=3), work=close)
    assert events[-1].finish_reason == "aborted" and handle.responses[0].is_cancelled


def test_the_first_replica_says_how_much_was_cached_and_when_it_began() -> None:
    async def twice(engine: RayEngine, handle: FakeHandle) -> list[TokenEvent]:
        await answer(engine, greedy(prompt_of(150), 3))  # type: ignore[arg-type]
        handle.fates = [Fate(dies_at=6)]
        request = greedy([*prompt_of(100), *prompt_of(50, 3)], 20)
        return [event async for event in engine.generate(request)]

    events, *_ = play(work=twice)
    assert len({event.num_cached_tokens for event in events}) == 1 and events[0].num_cached_tokens > 0
    assert all(event.began is not None and event.began > 0 for event in events)


def test_prompts_are_scored_by_any_replica() -> None:
    async def score(engine: RayEngine, handle: FakeHandle) -> Any:
        assert isinstance(engine, PromptScorer)
        scores = await engine.score((1, 2, 3), 2)
        assert scores == await handle.engine.score((1, 2, 3), 2)
        handle.fates = [Fate(raises=DiedError())]
        assert await engine.score((1, 2, 3), 2) == scores
        handle.fates = [Fate(raises=DiedError())] * 9
        with pytest.raises(EngineError, match="died"):
            await engine.score((1, 2, 3), 2)

    play(work=score)
