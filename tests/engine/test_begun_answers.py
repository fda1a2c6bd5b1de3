"""An answer that was cut off elsewhere goes on here with the tokens that would have come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as AnySequence
from dataclasses import replace
from typing import Any

import pytest

from harmonium.config import EngineConfig
from harmonium.demo import demo_checkpoint_path
from harmonium.engine import LocalEngine, Request
from harmonium.engine.protocol import EngineInfo, Token
from harmonium.engine.remote import RemoteEngine
from harmonium.engine.scripted import ScriptedEngine
from harmonium.engine.sequence import Sequence
from harmonium.errors import RequestError
from harmonium.harmony import RETURN, Conversation, Message, render_prompt
from harmonium.harmony.grammar import TurnRules, compile_turn
from harmonium.harmony.grammar_text import json_schema_format
from harmonium.model.batch import SamplingParams
from tests.engine.serving import check_empty, collect, greedy, make_engine, prompt_of
from tests.engine.test_constraint import PATTERN, STOP, MaskedRunner, Pattern, PatternState, any_of, just

PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.25}


def sampled(prompt: AnySequence[int], **params: Any) -> Request:
    return Request("r", tuple(prompt), SamplingParams(**params))


def cut_everywhere(engine: LocalEngine, whole: Request) -> list[int]:
    """The answer's token ids; cut behind each of them and gone on with, it must be the same."""

    async def told(request: Request) -> tuple[list[Token], str | None]:
        events = await collect(engine, request)
        return [token for event in events for token in event.tokens], events[-1].finish_reason

    async def run() -> list[int]:
        tokens, reason = await told(whole)
        ids = [token.token_id for token in tokens]
        cut = [replace(whole, answer_token_ids=tuple(ids[:place])) for place in range(len(tokens))]
        for first in range(0, len(cut), 8):
            rests = await asyncio.gather(*(told(request) for request in cut[first : first + 8]))
            for place, rest in enumerate(rests, first):
                assert rest == (tokens[place:], reason), place
        await engine.close()
        check_empty(engine)
        return ids

    return asyncio.run(run())


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(
    "request_",
    [
        greedy(prompt_of(70), 90),
        greedy([1], 5),
        sampled(prompt_of(33), temperature=1.0, seed=11, max_tokens=60),
        sampled(prompt_of(33), temperature=1.0, seed=-3, max_tokens=40, logprobs=2, **PENALTIES),
        sampled(prompt_of(100), temperature=0.0, max_tokens=40, **PENALTIES),
        replace(greedy(prompt_of(20), 200), stop_token_ids=frozenset({17})),
    ],
    ids=["greedy", "short", "seed", "penalties and logprobs", "greedy with penalties", "stop token"],
)
def test_an_answer_cut_at_any_place_goes_on_with_the_same_tokens(
    request_: Request, prefix_cache: bool
) -> None:
    assert cut_everywhere(make_engine(prefix_cache=prefix_cache), request_)


def test_a_constrained_answer_cut_at_any_place_goes_on_with_the_same_tokens() -> None:
    """Also in the midst of forced tokens, at the beginning, between choices and before the end."""
    rows = (*PATTERN[:-1], *[any_of(1, 2, 3) if i % 3 else just(4) for i in range(40)], PATTERN[-1])
    params = SamplingParams(temperature=1.0, seed=5, logprobs=1, **PENALTIES)
    request = Request("r", (1, 2), params, frozenset({STOP}), constraint=Pattern(*rows))
    assert len(cut_everywhere(make_engine(MaskedRunner()), request)) == len(rows)


class _ForgetfulState(PatternState):
    """Forces tokens only where a run of them begins, as a grammar that looks at whole words may."""

    def forced_tokens(self) -> list[int]:
        is_inside = self.place > 0 and len(self.rows[self.place - 1].choices) == 1
        return [] if is_inside else super().forced_tokens()


class _Forgetful(Pattern):
    def start(self) -> PatternState:
        return _ForgetfulState(self.rows)


def test_what_was_forced_together_stays_forced_when_it_is_cut() -> None:
    rows = [just(3), just(4), just(5), any_of(6, 7), just(8), just(9), just(10), any_of(11, 12)]
    request = Request("r", (1, 2), SamplingParams(temperature=0, logprobs=0), constraint=_Forgetful(*rows))
    assert len(cut_everywhere(make_engine(MaskedRunner()), request)) == len(rows)


def test_a_begun_answer_that_its_constraint_forbids_ends_with_an_error() -> None:
    async def ends(answer: tuple[int, ...]) -> tuple[str | None, str | None]:
        engine = make_engine(MaskedRunner())
        request = Request("r", (1, 2), constraint=Pattern(*PATTERN[:3]), answer_token_ids=answer)
        events = await collect(engine, request)
        await engine.close()
        check_empty(engine)
        return events[-1].finish_reason, events[-1].error

    assert asyncio.run(ends((3, 4, 7)))[0] == "error"
    assert asyncio.run(ends((3, 4, 5))) == ("stop", None)  # complete already
    assert asyncio.run(ends((3, 4, 5, 6)))[0] == "error"


def test_cached_tokens_of_a_begun_answer_are_prompt_tokens_alone() -> None:
    async def run() -> list[int]:
        engine = make_engine()
        request = greedy(prompt_of(200), 100)
        answer = [t.token_id for e in await collect(engine, request) for t in e.tokens]
        again = await collect(engine, replace(request, answer_token_ids=tuple(answer[:90])))
        await engine.close()
        return [event.num_cached_tokens for event in again]

    counts = asyncio.run(run())
    assert 0 < max(counts) <= 200


def test_penalties_count_a_begun_answer_and_prompts_do_not() -> None:
    params = SamplingParams(repetition_penalty=1.1, max_tokens=9)
    sequence = Sequence(Request("r", (4, 1, 4), params, answer_token_ids=(9, 4, 9)), 100)
    row = sequence.row_sampling()
    assert row.prompt_token_ids is not None and row.prompt_token_ids.tolist() == [1, 4]
    assert row.answer_token_ids is not None and row.answer_token_ids.tolist() == [9, 4]
    assert row.answer_counts is not None and row.answer_counts.tolist() == [2, 1]
    assert (sequence.num_prompt, sequence.num_tokens, sequence.max_total) == (3, 6, 12)


@pytest.mark.parametrize(
    ("answer", "max_tokens", "message"),
    [
        ((1, 97), 9, "answer token 1 is 97; expected 0 to 96"),
        ((1, -1), 9, "answer token 1 is -1"),
        ((1, 2), 2, "the answer has 2 tokens already; the limit is 2"),
        ((1,) * 31, None, "the answer has 31 tokens already; the limit is 31"),
        ((1, 5, 2), 9, "has a stop token already"),
    ],
)
def test_an_answer_that_is_over_or_no_answer_is_refused(
    answer: tuple[int, ...], max_tokens: int | None, message: str
) -> None:
    engine = make_engine(context_length=32)
    request = greedy([1], max_tokens, stop_token_ids=frozenset({5}), answer_token_ids=answer)
    with pytest.raises(RequestError, match=message):
        engine.admit(request)
    asyncio.run(engine.close())


def test_engines_that_cannot_go_on_say_so() -> None:
    request = Request("r", (1,), answer_token_ids=(2,))
    info = EngineInfo("m", 100, 97, "vllm")
    with pytest.raises(RequestError, match="vLLM does not go on"):
        RemoteEngine((), info).admit(request)
    with pytest.raises(RequestError, match="a script does not go on"):
        ScriptedEngine([[1, 2]]).admit(request)


SCHEMA = {
    "type": "object",
    "properties": {
        "temperature_in_oslo": {"type": "number"},
        "measured_at": {"enum": ["morning", "noon", "midnight"]},
        "is_certain": {"type": "boolean"},
    },
    "required": ["temperature_in_oslo", "measured_at", "is_certain"],
    "additionalProperties": False,
}


def test_a_schema_holds_over_a_cut_at_any_place() -> None:
    from harmonium.engine.create import create_engine  # native kernels

    turn = compile_turn(TurnRules(answer=json_schema_format(SCHEMA, "schema"), max_reasoning_tokens=8))
    prompt = tuple(render_prompt(Conversation((Message("user", "How warm is it?"),))))
    request = Request(
        "r", prompt, SamplingParams(temperature=0, max_tokens=70), frozenset({RETURN}), constraint=turn
    )
    engine = create_engine(demo_checkpoint_path(), EngineConfig(context_length=512, threads=1))
    ids = cut_everywhere(engine, request)
    assert len(ids) > 20
