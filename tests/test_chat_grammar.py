"""Chat under the grammar: a model with random weights writes legal turns; scripted turns are held to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from harmonium import LLM, SamplingParams, cli
from harmonium.chat import ChatRequest, complete_chat
from harmonium.chat_events import ChatResult
from harmonium.engine.protocol import Token
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import RequestError
from harmonium.harmony.grammar import TurnRules
from harmonium.harmony.messages import Conversation, Message, Tool
from harmonium.harmony.render import render_messages
from harmonium.harmony.vocabulary import CALL, END, RETURN, START, vocabulary
from harmonium.testing import make_tiny_checkpoint
from tests.scripted_chat import gen

CITY = {"enum": ["Oslo", "Bergen", "Tromsø"]}
WEATHER = {
    "type": "object",
    "properties": {"city": CITY, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}
NOW = {"type": "function", "function": {"name": "now"}}
ANSWER = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "city": CITY, "word": {"type": "string", "maxLength": 12}},
    "required": ["ok", "city", "word"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": ANSWER, "strict": True}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, the true vocabulary."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("grammar") / "tiny")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, context_length=1024, max_sequences=4, max_batch_tokens=128, threads=1) as opened:
        yield opened


def hot(seed: int, max_tokens: int = 300) -> SamplingParams:
    return SamplingParams(temperature=1.5, seed=seed, max_tokens=max_tokens)


@pytest.mark.parametrize("seed", range(6))
def test_random_weights_write_a_legal_turn_with_a_valid_answer(llm: LLM, seed: int) -> None:
    result = llm.chat("Hello", response_format=FORMAT, max_reasoning_tokens=5, sampling=hot(seed))
    assert (result.finish_reason, result.diagnostics) == ("stop", ())
    jsonschema.validate(json.loads(result.content), ANSWER)
    assert result.usage.reasoning_tokens <= 5
    assert result.token_ids[-1] == RETURN
    prompt = render_messages(result.messages)  # what they wrote is what they will read
    assert prompt == [START, *vocabulary().encode("assistant"), *result.token_ids[:-1], END]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["any", "named"]
)
def test_random_weights_make_the_call_that_is_demanded(llm: LLM, seed: int, choice: Any) -> None:
    # A preamble is free text: random weights would hardly ever end one.
    sampling = SamplingParams(temperature=1.5, seed=seed, max_tokens=600, logit_bias={END: 30.0})
    result = llm.chat("Hello", tools=[TOOL, NOW], tool_choice=choice, sampling=sampling)
    assert (result.finish_reason, result.diagnostics) == ("tool_calls", ())
    (call,) = result.tool_calls
    assert call.is_declared and call.is_complete
    schema = WEATHER if call.name == "get_weather" else {"type": "object", "maxProperties": 0}
    jsonschema.validate(json.loads(call.arguments), schema)
    assert choice == "required" or call.name == "get_weather"


def test_spent_reasoning_opens_the_answer(llm: LLM) -> None:
    # This seed begins with reasoning.
    result = llm.chat("Hello", max_reasoning_tokens=4, sampling=hot(3, 40))
    assert result.usage.reasoning_tokens == 4 and result.diagnostics == ()
    assert result.content and result.finish_reason == "length"
    silent = llm.chat("Hello", max_reasoning_tokens=0, sampling=hot(1, 20))
    assert silent.reasoning == "" and silent.content


def test_without_the_grammar_random_weights_write_no_harmony(llm: LLM) -> None:
    result = llm.chat("Hello", grammar=False, sampling=hot(1, 40))
    assert result.diagnostics


def test_log_probabilities_are_those_under_the_mask(llm: LLM) -> None:
    sampling = SamplingParams(temperature=1.5, seed=3, max_tokens=300, logprobs=2)
    fmt = {"type": "grammar", "syntax": "regex", "definition": "(yes|no)!"}
    result = llm.chat("Hello", response_format=fmt, max_reasoning_tokens=0, sampling=sampling)
    assert result.content in ("yes!", "no!")
    for token in result.content_tokens:
        assert token.logprob is not None and token.logprob <= 0.0
        allowed = [logprob for _, logprob in token.top_logprobs if logprob > -1e30]
        assert allowed and max(allowed) <= 0.0


def test_format_that_cannot_be_kept_is_refused_before_anything_runs(llm: LLM) -> None:
    schema = {"type": "array", "uniqueItems": True}
    strict = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    with pytest.raises(RequestError, match="uniqueItems"):
        llm.chat("Hello", response_format=strict)
    with pytest.raises(RequestError, match="there is no tool to call"):
        llm.chat("Hello", tool_choice="required")
    with pytest.raises(RequestError, match=r"response_format.type is 'xml'"):
        llm.chat("Hello", response_format={"type": "xml"})


def test_command_line_chat_is_legal_unless_told_otherwise(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", str(model), "Hi", "--json", "--max-tokens", "12", "--seed", "1", "--threads", "1"]
    words += ["--context-length", "512"]
    assert cli.main(words) == 0
    legal = json.loads(capsys.readouterr().out)
    assert legal["diagnostics"] == []
    assert cli.main([*words, "--no-grammar"]) == 0
    assert json.loads(capsys.readouterr().out)["diagnostics"] != []


CALL_A = '<|channel|>commentary to=functions.a <|constrain|>json<|message|>{"x": 1}<|call|>'
CALL_B = '<|channel|>commentary to=functions.b <|constrain|>json<|message|>{"y": 2}<|call|>'
LOOSE = Tool("a", parameters={"type": "object", "properties": {"x": {}}, "minProperties": 1})


def play(text: str, rules: TurnRules | None, obeys: bool = False, size: int = 1) -> ChatResult:
    engine = ScriptedEngine([Script(gen(text), end="stop", obeys_constraint=obeys)], tokens_per_event=size)
    conversation = Conversation(
        messages=(Message("user", "Hello"),),
        tools=(LOOSE, Tool("b", parameters={"type": "object", "properties": {"y": {}}})),
    )
    return asyncio.run(complete_chat(engine, ChatRequest(conversation, grammar=rules)))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_several_calls_come_where_they_were_allowed(size: int) -> None:
    written_result = "<|start|>functions.a to=assistant<|channel|>commentary<|message|>22C<|end|>"
    text = f"{CALL_A}<|start|>assistant{CALL_B}{written_result}"
    several = play(text, TurnRules(max_calls=4), size=size)
    assert [(call.name, call.arguments) for call in several.tool_calls] == [
        ("a", '{"x": 1}'),
        ("b", '{"y": 2}'),
    ]
    assert (several.finish_reason, several.diagnostics, several.content) == ("tool_calls", (), "")
    assert render_messages(several.messages) == [
        *(START, *vocabulary().encode("assistant"), *gen(CALL_A)),
        *(START, *vocabulary().encode("assistant"), *gen(CALL_B)),
    ]
    one = play(text, TurnRules(), size=size)
    assert [call.name for call in one.tool_calls] == ["a"] and one.finish_reason == "tool_calls"
    assert one.token_ids == gen(CALL_A)
    assert len({call.call_id for call in several.tool_calls}) == 2


def test_number_of_calls_is_bounded_whatever_the_engine_sends() -> None:
    text = "<|start|>assistant".join([CALL_A] * 5)
    assert len(play(text, TurnRules(max_calls=3)).tool_calls) == 3
    assert len(play(text, None).tool_calls) == 1


@pytest.mark.parametrize(
    "rest", ["", "commentary<|call|><|return|>", "<|start|>", "<|return|>", "<|start|><|start|>"]
)
def test_nothing_but_a_message_of_the_assistant_goes_on_after_a_call(rest: str) -> None:
    result = play(CALL_A + rest, TurnRules(max_calls=4))
    assert [call.name for call in result.tool_calls] == ["a"]
    assert result.finish_reason == "tool_calls" and result.content == ""


def test_what_is_not_enforced_is_told_with_the_turn() -> None:
    result = play(CALL_A, TurnRules())
    assert len(result.warnings) == 1 and result.warnings[0].startswith("tool 'a': ")
    assert "minProperties" in result.warnings[0]
    assert play(CALL_A, None).warnings == ()


def test_script_that_obeys_the_grammar_ends_at_an_illegal_token() -> None:
    bad = "<|channel|>commentary to=functions.b<|message|>ls"
    result = play(bad, TurnRules(), obeys=True)
    assert result.finish_reason == "error" and "does not allow" in str(result.error)
    assert play(bad, TurnRules()).finish_reason != "error"
    assert play(CALL_B, TurnRules(), obeys=True).finish_reason == "tool_calls"


def test_engine_gets_the_constraint_and_the_tokens_that_end_the_turn() -> None:
    async def run(rules: TurnRules | None) -> ScriptedEngine:
        engine = ScriptedEngine([[Token(RETURN)]])
        await complete_chat(
            engine, ChatRequest(Conversation((Message("user", "Hi"),), tools=(LOOSE,)), grammar=rules)
        )
        return engine

    (one,) = asyncio.run(run(TurnRules())).requests
    (several,) = asyncio.run(run(TurnRules(max_calls=2))).requests
    (free,) = asyncio.run(run(None)).requests
    assert one.stop_token_ids == free.stop_token_ids == {RETURN, CALL}
    assert several.stop_token_ids == {RETURN}
    assert one.constraint is not None and several.constraint is not None and free.constraint is None
