"""Answers that keep to a constraint, made of several calls to an upstream that knows nothing of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pytest

from harmonium.engine import Request, Token, TokenEvent
from harmonium.engine.guided import Answer, GuidedAnswer
from harmonium.engine.vllm_wire import Call, Chunk, LostError
from harmonium.errors import EngineError
from harmonium.harmony.grammar import TurnRules, compile_turn
from harmonium.harmony.vocabulary import VOCABULARY_SIZE, vocabulary
from harmonium.model.batch import SamplingParams
from tests.scripted_chat import gen

STOP = 9


@dataclass
class Digits:
    """Allows these sets of tokens in turn; a set of one is forced, and after the last it is complete."""

    sets: Sequence[Sequence[int]]
    told: list[int] = field(default_factory=list)

    def start(self) -> Digits:
        return replace(self, told=[])

    @property
    def is_complete(self) -> bool:
        return len(self.told) == len(self.sets)

    def mask(self) -> npt.NDArray[np.uint32]:
        bits = np.zeros(64, np.uint8)
        bits[list(self.sets[len(self.told)])] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def forced_tokens(self) -> list[int]:
        forced: list[int] = []
        for allowed in self.sets[len(self.told) :]:
            if len(allowed) != 1:
                break
            forced += allowed
        return forced

    def advance(self, token_id: int) -> None:
        if token_id not in self.sets[len(self.told)]:
            raise EngineError(f"token {token_id} is not allowed")
        self.told.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        raise AssertionError("nothing is guessed ahead here")

    def copy(self) -> Digits:
        return replace(self, told=list(self.told))


class Upstream:
    """Answers each call with what `choose` says of it, cut where the call wants it cut."""

    def __init__(self, choose: Callable[[Call], Sequence[int]], chunk: int = 1) -> None:
        self.choose, self.chunk = choose, chunk
        self.calls: list[Call] = []

    async def stream(self, call: Call) -> AsyncGenerator[Chunk, None]:
        self.calls.append(call)
        tokens = list(self.choose(call))[: call.max_tokens]
        for place in range(0, len(tokens), self.chunk):
            part = tokens[place : place + self.chunk]
            yield Chunk(tuple(Token(token) for token in part))
        yield Chunk((), "length", 5)


def answer(
    upstream: Upstream, request: Request, room: int = 100, max_corrections: int = 50
) -> tuple[list[int], TokenEvent]:
    """The tokens, and the last event; there must be one end."""

    async def run() -> list[TokenEvent]:
        guided = GuidedAnswer(request, room, "m", max_corrections)
        return [event async for event in guided.events(upstream.stream)]

    events = asyncio.run(run())
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason is not None
    return [token.token_id for event in events for token in event.tokens], events[-1]


def digits(*sets: Sequence[int], **sampling: float) -> Request:
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    return Request("r", (60, 61), params, frozenset({STOP}), constraint=Digits(sets))


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_legal_answer_is_one_call_and_ends_when_it_is_complete(chunk: int) -> None:
    upstream = Upstream(lambda call: [1, 2, 3, 4, 5, 6], chunk)
    tokens, last = answer(upstream, digits([1, 7], [2, 7], [3, 7]))
    assert (tokens, last.finish_reason, len(upstream.calls)) == ([1, 2, 3], "stop", 1)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_token_that_is_not_allowed_is_drawn_again_among_those_that_are(chunk: int) -> None:
    upstream = Upstream(lambda call: [8] if call.allowed_token_ids or call.bias else [1, 50, 3], chunk)
    tokens, last = answer(upstream, digits([1, 7], [8, 7], [50, 5], [3]))
    # Behind the 8 the upstream begins again with a 1, which is not allowed, and then draws an 8, which is
    # not either: that is the end.
    assert tokens == [1, 8]
    assert (last.finish_reason, last.error) == ("error", "token 8 is not allowed")
    drawn = upstream.calls[1]
    assert (drawn.max_tokens, drawn.token_ids) == (1, (60, 61, 1))
    assert drawn.bias.keys() == set(range(64)) - {7, 8} and set(drawn.bias.values()) == {-100.0}
    assert upstream.calls[2].token_ids == (60, 61, 1, 8)
    assert [call.request_id for call in upstream.calls] == ["r", "r-2", "r-3", "r-4"]


def test_tokens_that_must_come_are_put_without_a_call() -> None:
    upstream = Upstream(lambda call: [1, 50] if len(call.token_ids) == 2 else [6])
    tokens, last = answer(upstream, digits([1, 7], [2], [3], [6, 5], logprobs=0))
    assert (tokens, last.finish_reason, len(upstream.calls)) == ([1, 2, 3, 6], "stop", 2)
    assert upstream.calls[1].token_ids == (60, 61, 1, 2, 3)


def test_limit_of_tokens_holds_over_all_calls() -> None:
    upstream = Upstream(lambda call: [50])
    tokens, last = answer(upstream, digits([1], [2], [3], [4]), room=3)
    assert (tokens, last.finish_reason) == ([1, 2, 3], "length")
    upstream = Upstream(lambda call: [1] * 10)
    tokens, last = answer(upstream, digits(*[[1, 2]] * 10), room=4)
    assert (tokens, last.finish_reason, upstream.calls[0].max_tokens) == ([1] * 4, "length", 4)


def test_stop_token_ends_an_answer_that_is_not_complete() -> None:
    tokens, last = answer(Upstream(lambda call: [1, STOP, 1]), digits([1, 2], [STOP, 1], [1, 2]))
    assert (tokens, last.finish_reason) == ([1, STOP], "stop")


def test_corrections_are_bounded_and_none_makes_a_breach_an_error() -> None:
    sets = [[1, 2]] * 30
    upstream = Upstream(lambda call: [1] if call.bias else [50])
    tokens, last = answer(upstream, digits(*sets), max_corrections=4)
    assert (tokens, last.finish_reason) == ([1] * 4, "error")
    tokens, last = answer(Upstream(lambda call: [50]), digits(*sets), max_corrections=0)
    assert (tokens, last.error) == ([], "token 50 is not allowed")


def test_penalties_go_on_behind_a_correction() -> None:
    upstream = Upstream(lambda call: [2] if call.max_tokens == 1 else [1, 1, 50])
    asked = digits([1, 2], [1, 2], [2, 3], [4, 5], presence_penalty=0.5, frequency_penalty=0.25)
    answer(upstream, asked)
    assert upstream.calls[0].bias == {}
    third = upstream.calls[2]
    assert third.bias == {1: -0.5 - 0.25 * 2, 2: -0.5 - 0.25}


def test_seeds_of_the_calls_differ_and_repeat_with_the_request() -> None:
    def seeds() -> list[int]:
        upstream = Upstream(lambda call: [1] if call.bias else [50])
        answer(upstream, digits(*[[1, 2]] * 3, seed=7))
        return [
            call.sampling.seed + call.seed_step for call in upstream.calls if call.sampling.seed is not None
        ]

    assert seeds() == seeds()
    assert len(set(seeds())) == len(seeds()) == 6


def test_draws_have_the_distribution_of_a_draw_among_the_allowed() -> None:
    share = {1: 0.5, 2: 0.1, 3: 0.1, 50: 0.3}
    rng = np.random.default_rng(0)

    def draw(call: Call) -> list[int]:
        allowed = [token for token in share if token not in call.bias]
        weights = np.array([share[token] for token in allowed])
        return [int(rng.choice(allowed, p=weights / weights.sum()))]

    num = 3000
    found = Counter(answer(Upstream(draw), digits([2, 3, 50]))[0][0] for _ in range(num))
    assert found.keys() == {2, 3, 50}
    for token, expected in ((2, 0.2), (3, 0.2), (50, 0.6)):
        sigma = (expected * (1 - expected) / num) ** 0.5
        assert abs(found[token] / num - expected) < 5 * sigma


def test_turn_of_the_real_grammar_is_put_right() -> None:
    """A model that will not call a tool, though it must."""
    from harmonium.harmony.messages import Tool

    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    rules = TurnRules(tool_choice="required", max_reasoning_tokens=0)
    turn = compile_turn(rules, [Tool("weather", "", schema)])
    refusal = gen("<|channel|>final<|message|>I will not.<|return|>")

    def choose(call: Call) -> Sequence[int]:
        if call.max_tokens == 1 and call.allowed_token_ids is not None:
            return [call.allowed_token_ids[0]]
        return refusal

    upstream = Upstream(choose)
    request = Request("r", gen("<|start|>assistant"), stop_token_ids=turn.stop_token_ids, constraint=turn)
    tokens, last = answer(upstream, request, room=200)
    text = vocabulary().decode(tokens)
    assert last.finish_reason == "stop", last
    assert "to=functions.weather" in text and text.endswith('{"city":"Paris"}<|call|>'), text
    assert max(tokens) < VOCABULARY_SIZE


@pytest.mark.parametrize("is_guided", [True, False])
def test_answer_whose_upstream_goes_away_goes_on_once_behind_its_tokens(is_guided: bool) -> None:
    calls: list[Call] = []

    async def stream(call: Call) -> AsyncGenerator[Chunk, None]:
        calls.append(call)
        if len(calls) <= num_lost:
            yield Chunk((Token(1),))
            raise LostError("gone")
        yield Chunk((Token(2),), "stop")

    async def run() -> list[TokenEvent]:
        asked = digits([1, 2], [1, 2])
        plain = Answer(replace(asked, constraint=None), 50, "m")
        one = GuidedAnswer(asked, 50, "m", 5) if is_guided else plain
        return [event async for event in one.events(stream)]

    num_lost = 1
    events = asyncio.run(run())
    assert [token.token_id for event in events for token in event.tokens] == [1, 2]
    assert (events[-1].finish_reason, calls[1].token_ids, calls[1].max_tokens) == ("stop", (60, 61, 1), 49)
    calls.clear()
    num_lost = 5
    if is_guided:
        return  # the second token completes it
    with pytest.raises(LostError):
        asyncio.run(run())
    assert len(calls) == 2
