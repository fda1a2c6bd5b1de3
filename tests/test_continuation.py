"""Continuing tokens with no conversation around them."""

from __future__ import annotations

import asyncio
import io

import pytest

from harmonium.continuation import Continuation, checked_prompt, generate, logprob_table, read_prompt
from harmonium.engine.protocol import EngineInfo, Token
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import ConfigError, EngineError, PromptTooLong
from harmonium.harmony.vocabulary import CALL, RETURN, vocabulary
from harmonium.model.batch import SamplingParams


def run(engine: ScriptedEngine, sampling: SamplingParams | None = None) -> tuple[Continuation, str]:
    out = io.StringIO()
    found = asyncio.run(generate(engine, (1, 2), sampling or SamplingParams(), out))
    return found, out.getvalue()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_text_written_is_the_text_returned_for_any_chunking(size: int) -> None:
    tokens = [*vocabulary().encode("naïve 🧑‍🚀 日本"), RETURN]
    found, written = run(ScriptedEngine([tokens], tokens_per_event=size))
    assert found.text == written == "naïve 🧑‍🚀 日本"
    assert [token.token_id for token in found.tokens] == tokens
    assert found.finish_reason == "stop"


def test_character_that_is_cut_off_is_shown_as_a_replacement() -> None:
    tokens = vocabulary().encode("🧑")
    assert len(tokens) > 1
    found, written = run(ScriptedEngine([tokens]), SamplingParams(max_tokens=1))
    assert found.text == written == "\ufffd"
    assert found.finish_reason == "length"


def test_stop_tokens_are_the_models_own() -> None:
    engine = ScriptedEngine([(5,)])
    run(engine)
    assert engine.requests[0].stop_token_ids == {RETURN, CALL}


def test_failure_on_the_way_raises_what_the_engine_said() -> None:
    with pytest.raises(EngineError, match="out of blocks"):
        run(ScriptedEngine([Script((5,), error="out of blocks")]))


def test_too_long_prompt_is_refused() -> None:
    with pytest.raises(PromptTooLong):
        run(ScriptedEngine([(5,)], info=EngineInfo("m", 2, 201_088, engine="scripted")))


def test_logprob_table_has_a_line_for_each_token() -> None:
    script = [Token(64, -0.25, ((64, -0.25), (65, -2.0))), Token(66, -1.0)]
    found, _ = run(ScriptedEngine([script]), SamplingParams(logprobs=2))
    first, second = logprob_table(found).splitlines()
    assert first.split() == ["64", "-0.250", "'a'", "'a'", "-0.250", "'b'", "-2.000"]
    assert second.split() == ["66", "-1.000", "'c'"]


def test_text_of_a_special_token_stays_text() -> None:
    _, prompt = read_prompt("<|end|>", None)
    assert max(prompt) < 199_998
    assert vocabulary().decode(prompt) == "<|end|>"


def test_empty_prompt_is_named() -> None:
    with pytest.raises(ConfigError, match="the prompt holds no token"):
        checked_prompt(*read_prompt("", None), 201_088)
