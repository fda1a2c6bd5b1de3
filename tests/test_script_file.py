"""Answers in a file: what a line may say, and which line a request gets."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from harmonium.chat import ChatRequest, complete_chat, stream_chat
from harmonium.chat_events import ChatResult, ContentDelta
from harmonium.engine.scripted import ScriptedEngine
from harmonium.errors import ConfigError, EngineError
from harmonium.harmony.messages import Conversation, Message
from harmonium.script_file import harmony_tokens, last_user_text, read_line, scripted_engine

HI = "<|channel|>final<|message|>hi<|return|>"


def write(folder: Path, *lines: Any) -> ScriptedEngine:
    path = folder / "answers.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    return scripted_engine(path)


def ask(engine: ScriptedEngine, text: str = "x") -> ChatResult:
    return asyncio.run(complete_chat(engine, ChatRequest(Conversation((Message("user", text),)))))


def final(text: str) -> str:
    return HI.replace("hi", text)


def test_lines_without_match_go_out_in_order_and_then_there_is_a_clear_error(tmp_path: Path) -> None:
    engine = write(tmp_path, {"harmony": final("one")}, {"token_ids": list(harmony_tokens(final("two")))})
    assert [ask(engine).content for _ in range(2)] == ["one", "two"]
    with pytest.raises(EngineError, match=r"answers\.jsonl: no line is left .* 'third question'"):
        ask(engine, "third question")


def test_line_with_match_is_kept_for_a_request_that_it_fits(tmp_path: Path) -> None:
    engine = write(
        tmp_path,
        {"harmony": final("weather"), "match": "Oslo", "repeat": True},
        {"harmony": final("other")},
    )
    answers = [ask(engine, text).content for text in ("in Oslo?", "hi", "Oslo again")]
    assert answers == ["weather", "other", "weather"]


@pytest.mark.parametrize(
    ("end", "finish", "error"),
    [("stop", "length", None), ("length", "length", None), ("error", "error", "the script ends")],
)
def test_end_says_what_happens_when_the_tokens_are_used_up(
    tmp_path: Path, end: str, finish: str, error: str | None
) -> None:
    result = ask(write(tmp_path, {"harmony": "<|channel|>final<|message|>cut", "end": end}))
    assert (result.content, result.finish_reason) == ("cut", finish)
    assert (result.error is None) if error is None else (error in str(result.error))


def test_chunk_is_the_number_of_tokens_in_an_event(tmp_path: Path) -> None:
    engine = write(tmp_path, {"harmony": final("a b c d e"), "chunk": 4, "delay_seconds": 0.001})

    async def deltas() -> list[str]:
        request = ChatRequest(Conversation((Message("user", "x"),)))
        return [e.text async for e in stream_chat(engine, request) if isinstance(e, ContentDelta)]

    assert "".join(asyncio.run(deltas())) == "a b c d e"


def test_special_tokens_that_are_spelled_become_one_token_and_no_other_text_does() -> None:
    ids = harmony_tokens("<|message|>a<|nonsense|><|reserved_200013|>")
    assert (ids[0], ids[-1]) == (200008, 200013)
    assert all(token_id < 199_998 for token_id in ids[1:-1])


def test_last_user_text_is_that_of_the_prompt() -> None:
    prompt = harmony_tokens(
        "<|start|>user<|message|>one<|end|><|start|>user<|message|>two<|end|><|start|>assistant"
    )
    assert last_user_text(prompt) == "two"
    assert last_user_text((1, 2, 3)) == ""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ("{}", "expected one of harmony and token_ids"),
        ('{"harmony": "a", "token_ids": [1]}', "expected one of harmony and token_ids"),
        ('{"harmony": 1}', "harmony is no text"),
        ('{"token_ids": [201088]}', "token id 201,088 is outside"),
        ('{"token_ids": [true]}', "no list of whole numbers"),
        ('{"harmony": "a", "chunk": 0}', "chunk is 0; expected a whole number"),
        ('{"harmony": "a", "chunk": 1.5}', "chunk is 1.5"),
        ('{"harmony": "a", "delay_seconds": -1}', "delay_seconds is -1"),
        ('{"harmony": "a", "delay_seconds": NaN}', "delay_seconds is nan"),
        ('{"harmony": "a", "end": "maybe"}', "end is 'maybe'"),
        ('{"harmony": "a", "match": ""}', "match is ''"),
        ('{"harmony": "a", "repeat": 1}', "repeat is 1"),
        ('{"harmony": "a", "dealy": 1}', "no field 'dealy'"),
    ],
)
def test_line_that_cannot_be_used_is_named(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match="here") as failure:
        read_line(line, "here")
    assert message in str(failure.value)


def test_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.jsonl: No such file"):
        scripted_engine(tmp_path / "nowhere.jsonl")
    with pytest.raises(ConfigError, match="holds no line"):
        write(tmp_path)
