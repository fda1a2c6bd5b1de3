"""The turn's laws, on a scripted engine: no weights, only token streams."""

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harmonium.chat import ChatRequest, complete_chat, stream_chat
from harmonium.chat_events import (
    ChatEvent,
    ChatResult,
    ContentDelta,
    Finish,
    MessageEnded,
    MessageStarted,
    ReasoningDelta,
    ResultBuilder,
    ToolArgumentsDelta,
    ToolCallEnded,
    ToolCallItem,
    ToolCallStarted,
    TurnStarted,
)
from harmonium.engine.protocol import EngineInfo, Token
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import EngineBusy, EngineError, HarmonyError, PromptTooLong, RequestError
from harmonium.harmony.messages import BROWSER, Conversation, Message, Tool
from harmonium.harmony.render import render_message, render_prompt
from harmonium.harmony.vocabulary import CALL, END, RETURN, START, vocabulary
from harmonium.model.batch import SamplingParams
from tests.scripted_chat import FINAL, REASONED, gen

CALL_F = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
PREAMBLE_AND_CALL = (
    "<|channel|>analysis<|message|>look<|end|><|start|>assistant<|channel|>commentary<|message|>I will check."
    f"<|end|><|start|>assistant{CALL_F}"
)


def request(*tools: str, sampling: SamplingParams | None = None, **settings: object) -> ChatRequest:
    conversation = Conversation(
        messages=(Message("user", "Hello"),), tools=tuple(Tool(name) for name in tools)
    )
    return ChatRequest(conversation, sampling or SamplingParams(), request_id="r", **settings)  # type: ignore[arg-type]


async def events_of(engine: ScriptedEngine, chat_request: ChatRequest) -> list[ChatEvent]:
    async with aclosing(stream_chat(engine, chat_request)) as events:
        return [event async for event in events]


def play(text: str, *tools: str, size: int = 1, sampling: SamplingParams | None = None) -> ChatResult:
    engine = ScriptedEngine([gen(text)], tokens_per_event=size)
    return asyncio.run(complete_chat(engine, request(*tools, sampling=sampling)))


def codes(result: ChatResult) -> set[str]:
    return {diagnostic.code for diagnostic in result.diagnostics}


def test_turn_is_started_and_ends_with_one_finish() -> None:
    events = asyncio.run(events_of(ScriptedEngine([gen(REASONED)]), request()))
    assert isinstance(events[0], TurnStarted)
    assert [isinstance(event, Finish) for event in events].count(True) == 1
    assert isinstance(events[-1], Finish)
    kinds = [type(event) for event in events if not isinstance(event, (ReasoningDelta, ContentDelta))]
    assert kinds == [TurnStarted, MessageStarted, MessageEnded, MessageStarted, MessageEnded, Finish]


def test_reasoning_and_content_are_told_apart_and_counted() -> None:
    result = play(REASONED)
    assert (result.reasoning, result.content, result.finish_reason) == ("think hard", "Hi there", "stop")
    assert result.usage.reasoning_tokens == len(vocabulary().encode("think hard"))
    assert result.usage.completion_tokens == len(gen(REASONED))
    assert result.usage.prompt_tokens == len(render_prompt(request().conversation))
    assert result.usage.total_tokens == result.usage.prompt_tokens + result.usage.completion_tokens
    assert result.diagnostics == ()


def test_engine_gets_harmony_prompt_and_both_stop_tokens_besides_ours() -> None:
    engine = ScriptedEngine([gen(FINAL.format("x"))])
    asyncio.run(complete_chat(engine, request(stop_token_ids=frozenset({7}), cache_salt="s")))
    (sent,) = engine.requests
    assert sent.token_ids == tuple(render_prompt(request().conversation))
    assert sent.stop_token_ids == {RETURN, CALL, 7}
    assert sent.cache_salt == "s"


@pytest.mark.parametrize(
    "text", [REASONED, PREAMBLE_AND_CALL, FINAL.format("naïve 🎉 日本"), "<|channel|>??<|end|>"]
)
def test_stream_adds_up_to_the_same_result_for_any_chunking(text: str) -> None:
    results = [play(text, "f", size=size) for size in (1, 2, 3, 20)]
    assert all(result == results[0] for result in results)
    builder = ResultBuilder()
    for event in asyncio.run(events_of(ScriptedEngine([gen(text)]), request("f"))):
        builder.push(event)
    assert builder.result() == results[0]


def test_tool_call_has_start_arguments_and_end_with_one_id() -> None:
    events = asyncio.run(events_of(ScriptedEngine([gen(PREAMBLE_AND_CALL)]), request("f")))
    start = next(event for event in events if isinstance(event, ToolCallStarted))
    assert (start.name, start.recipient, start.is_declared) == ("f", "functions.f", True)
    deltas = [event for event in events if isinstance(event, ToolArgumentsDelta)]
    end = next(event for event in events if isinstance(event, ToolCallEnded))
    assert "".join(delta.text for delta in deltas) == '{"a": 1}' == end.message.content
    assert {event.call_id for event in [*deltas, start, end]} == {start.call_id}
    assert re.fullmatch(r"call_[0-9a-f]{24}", start.call_id)


def test_preamble_is_content_before_the_call() -> None:
    result = play(PREAMBLE_AND_CALL, "f")
    assert result.content == "I will check."
    assert [type(item).__name__ for item in result.items] == ["TextItem", "TextItem", "ToolCallItem"]
    assert result.finish_reason == "tool_calls"


def test_turn_replays_the_tokens_that_the_model_wrote() -> None:
    result = play(PREAMBLE_AND_CALL, "f")
    replayed = [token_id for message in result.messages for token_id in render_message(message)]
    assert tuple(replayed) == (START, *vocabulary().encode("assistant"), *gen(PREAMBLE_AND_CALL))


def test_replayed_final_ends_in_end_not_return() -> None:
    result = play(FINAL.format("x"))
    assert render_message(result.messages[-1])[-1] == END
    assert result.token_ids[-1] == RETURN


def test_missing_message_before_stop_still_gives_the_answer() -> None:
    result = play("<|channel|>final Hello there<|return|>")
    assert (result.content, result.finish_reason) == ("Hello there", "stop")
    assert codes(result) == {"missing_message"}
    assert [token.token_id for token in result.content_tokens] == vocabulary().encode(" Hello there")


def test_stop_in_a_header_is_malformed_and_never_an_exception() -> None:
    result = play("<|channel|>analysis<|return|>")
    assert (result.content, result.finish_reason) == ("", "stop")
    assert "incomplete_header" in codes(result)


def test_turn_ends_at_the_first_call_whatever_the_engine_sends() -> None:
    text = CALL_F + "commentary<|call|><|return|>"

    class Deaf(ScriptedEngine):
        """Sends what comes after a stop token too, as a remote engine with a fault does."""

        async def generate(self, request):  # type: ignore[no-untyped-def]
            from harmonium.engine.protocol import TokenEvent

            yield TokenEvent(tuple(Token(token_id) for token_id in gen(text)))
            pytest.fail("nothing may be asked for after the stop token")

    for engine in (ScriptedEngine([gen(text)]), Deaf([(1,)])):
        result = asyncio.run(complete_chat(engine, request("f", stop_token_ids=frozenset({5}))))
        assert result.finish_reason == "tool_calls"
        assert result.token_ids == gen(CALL_F)
        assert result.usage.completion_tokens == len(gen(CALL_F))
        assert result.tool_calls[0].arguments == '{"a": 1}'
        assert result.diagnostics == ()


def test_end_in_a_header_is_length_and_keeps_the_reasoning() -> None:
    result = play("<|channel|>analysis<|message|>ok<|end|><|start|>assistant<|channel|>")
    assert (result.reasoning, result.content, result.finish_reason) == ("ok", "", "length")


def test_end_of_text_with_nothing_to_show_is_no_stop() -> None:
    result = play("<|channel|>analysis<|message|>ok<|end|><|start|>assistant<|channel|><|endoftext|>")
    assert (result.reasoning, result.content, result.finish_reason) == ("ok", "", "length")
    assert play("<|channel|>final<|message|>yes<|endoftext|>").finish_reason == "stop"


def test_truncated_arguments_are_kept_with_finish_length() -> None:
    result = play('<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a":{"b":1}', "f")
    (call,) = result.tool_calls
    assert (call.name, call.arguments, call.is_complete) == ("f", '{"a":{"b":1}', False)
    assert result.finish_reason == "length"
    assert result.messages == ()


def test_max_tokens_inside_the_reasoning_gives_partial_reasoning() -> None:
    result = play(REASONED, sampling=SamplingParams(max_tokens=4))
    assert (result.content, result.finish_reason) == ("", "length")
    assert "think hard".startswith(result.reasoning)
    assert result.reasoning
    assert result.usage.completion_tokens == 4


def test_call_of_an_undeclared_tool_is_shown_and_does_not_finish_as_tool_calls() -> None:
    text = '<|channel|>commentary to=browser.search code<|message|>{"query":"x"}<|call|>'
    result = play(text)
    assert result.finish_reason == "stop"
    assert [call.is_declared for call in result.tool_calls] == [False]
    assert "undeclared_tool" in codes(result)
    conversation = Conversation(messages=(Message("user", "x"),), builtin_tools=(BROWSER,))
    declared = asyncio.run(complete_chat(ScriptedEngine([gen(text)]), ChatRequest(conversation)))
    assert declared.finish_reason == "tool_calls"


def test_call_without_namespace_counts() -> None:
    text = '<|channel|>commentary to=ask_followup <|constrain|>json<|message|>{"q":"?"}<|call|>'
    result = play(text, "ask_followup")
    assert (result.tool_calls[0].name, result.finish_reason) == ("ask_followup", "tool_calls")


def test_several_messages_are_joined_as_they_stream() -> None:
    text = (
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d"
        "<|end|><|start|>assistant<|channel|>final<|message|>e<|return|>"
    )
    result = play(text)
    assert (result.reasoning, result.content) == ("a\nb", "c\nd\ne")
    events = asyncio.run(events_of(ScriptedEngine([gen(text)]), request()))
    shown = [event.separator + event.text for event in events if isinstance(event, ContentDelta)]
    assert "".join(shown) == result.content


def test_stop_token_of_the_client_ends_the_turn_and_is_not_shown() -> None:
    (bang,) = vocabulary().encode("!")
    engine = ScriptedEngine([gen(FINAL.format("one! two"))])
    result = asyncio.run(complete_chat(engine, request(stop_token_ids=frozenset({bang}))))
    assert (result.content, result.finish_reason) == ("one", "stop")
    assert result.token_ids[-1] == bang


def test_logprobs_travel_with_the_text_they_belong_to() -> None:
    (word,) = vocabulary().encode("yes")
    tokens = [*gen("<|channel|>final<|message|>"), Token(word, -0.5, ((word, -0.5), (3, -1.5))), RETURN]
    sampling = SamplingParams(logprobs=2)
    result = asyncio.run(complete_chat(ScriptedEngine([tokens]), request(sampling=sampling)))
    assert result.content_tokens == (Token(word, -0.5, ((word, -0.5), (3, -1.5))),)


def test_character_cut_between_tokens_comes_whole_with_all_its_tokens() -> None:
    text = "🧑‍🚀"
    assert len(vocabulary().encode(text)) > 2
    events = asyncio.run(events_of(ScriptedEngine([gen(FINAL.format(text))]), request()))
    deltas = [event for event in events if isinstance(event, ContentDelta)]
    assert "".join(delta.text for delta in deltas) == text
    assert [token.token_id for delta in deltas for token in delta.tokens] == vocabulary().encode(text)
    assert "\ufffd" not in "".join(delta.text for delta in deltas)


def test_too_long_prompt_is_refused_before_the_first_event() -> None:
    engine = ScriptedEngine([(1,)], info=EngineInfo("m", 16, 201_088, engine="scripted"))
    with pytest.raises(PromptTooLong, match="the context is 16"):
        asyncio.run(events_of(engine, request()))
    assert engine.requests == []


def test_conversation_that_cannot_be_rendered_is_refused_before_admission() -> None:
    bad = ChatRequest(Conversation(messages=(Message("assistant", "x", token_ids=(-1,)),)))
    with pytest.raises(HarmonyError):
        asyncio.run(events_of(ScriptedEngine([(1,)], max_running=0), bad))


def test_busy_engine_refuses_before_the_first_event() -> None:
    with pytest.raises(EngineBusy):
        asyncio.run(events_of(ScriptedEngine([(1,)], max_running=0), request()))


def test_ignore_stop_is_refused() -> None:
    with pytest.raises(RequestError, match="ignore_stop"):
        request(sampling=SamplingParams(ignore_stop=True))


def test_failure_on_the_way_is_finish_error_with_the_text_so_far() -> None:
    engine = ScriptedEngine([Script(gen("<|channel|>final<|message|>half"), error="out of blocks")])
    result = asyncio.run(complete_chat(engine, request()))
    assert (result.content, result.finish_reason) == ("half", "error")
    assert isinstance(result.error, EngineError)
    assert str(result.error) == "out of blocks"


def test_closing_the_stream_aborts_the_request() -> None:
    engine = ScriptedEngine([gen(REASONED)])

    async def leave_early() -> None:
        async with aclosing(stream_chat(engine, request())) as events:
            async for event in events:
                if isinstance(event, ContentDelta):
                    assert engine.running == 1
                    break
        assert engine.running == 0

    asyncio.run(leave_early())
    assert engine.finished == ["aborted"]


def test_closing_the_engine_finishes_as_aborted() -> None:
    engine = ScriptedEngine([gen(REASONED)])

    async def close_in_the_middle() -> ChatResult:
        builder = ResultBuilder()
        async with aclosing(stream_chat(engine, request())) as events:
            async for event in events:
                builder.push(event)
                if isinstance(event, ReasoningDelta):
                    await engine.close()
        return builder.result()

    result = asyncio.run(close_in_the_middle())
    assert result.finish_reason == "aborted"
    assert result.reasoning


def test_result_of_a_stream_that_was_left_holds_what_was_shown() -> None:
    builder = ResultBuilder()
    for event in asyncio.run(events_of(ScriptedEngine([gen(REASONED)]), request())):
        if isinstance(event, ContentDelta):
            builder.push(event)
            break
        builder.push(event)
    result = builder.result()
    assert (result.reasoning, result.content, result.finish_reason) == ("think hard", "Hi", "aborted")
    assert [message.channel for message in result.messages] == ["analysis", "final"]
    assert not result.items[-1].is_complete
    assert result.usage.completion_tokens == 3


_PIECES = (
    *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|call|>", "<|return|>"),
    *("<|endoftext|>", "assistant", "analysis", "commentary", "final", " to=functions.f", " json", "{}", "é"),
    *("🧑‍🚀", " words", "\n"),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(pieces=st.lists(st.sampled_from(_PIECES), min_size=1, max_size=24), size=st.integers(1, 9))
def test_any_output_ends_in_one_finish_and_loses_no_token(pieces: list[str], size: int) -> None:
    token_ids = gen("".join(pieces))
    events = asyncio.run(events_of(ScriptedEngine([token_ids], tokens_per_event=size), request("f")))
    assert [type(event) for event in events].count(Finish) == 1
    finish = events[-1]
    assert isinstance(finish, Finish)
    assert token_ids[: len(finish.token_ids)] == finish.token_ids
    assert finish.finish_reason in ("stop", "tool_calls", "length")
    assert finish.usage.completion_tokens == len(finish.token_ids)
    starts = [event.index for event in events if isinstance(event, (MessageStarted, ToolCallStarted))]
    ends = [event.index for event in events if isinstance(event, (MessageEnded, ToolCallEnded))]
    assert starts == ends == list(range(len(starts)))
    builder = ResultBuilder()
    for event in events:
        builder.push(event)
    result = builder.result()
    assert result == asyncio.run(complete_chat(ScriptedEngine([token_ids]), request("f")))
    assert (result.finish_reason == "tool_calls") == (
        any(call.is_complete and call.is_declared for call in result.tool_calls)
        and result.finish_reason != "length"
    )
    for item in result.items:
        text = item.text if not isinstance(item, ToolCallItem) else item.arguments
        assert text == item.message.content


def test_stop_text_ends_the_content_and_nothing_else() -> None:
    script = (
        "<|channel|>analysis<|message|>a STOP b<|end|><|start|>assistant"
        "<|channel|>final<|message|>one two STOP three<|return|>"
    )
    engine = ScriptedEngine([gen(script)])
    request = ChatRequest(Conversation((Message("user", "x"),)), stop=("STOP",))
    result = asyncio.run(complete_chat(engine, request))
    assert (result.reasoning, result.content) == ("a STOP b", "one two ")
    assert result.finish_reason == "stop"
    assert result.messages[-1].content == "one two "
    assert result.messages[-1].token_ids is None
    assert engine.finished == ["aborted"]
    assert result.usage.completion_tokens == len(gen(script)) - 2
