from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harmonium import LLM, EngineConfig, SamplingParams
from harmonium.chat_events import ContentDelta, Finish, TurnStarted
from harmonium.engine.protocol import EngineInfo, Request
from harmonium.engine.scripted import Script, ScriptedEngine
from harmonium.errors import (
    CheckpointError,
    ConfigError,
    EngineClosed,
    EngineError,
    HarmonyError,
    PromptTooLong,
    RequestError,
)
from harmonium.harmony.messages import Message, Tool
from harmonium.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, vocabulary
from harmonium.llm_input import engine_config
from harmonium.testing import make_tiny_checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_stop=True)


def text(words: str) -> list[int]:
    return vocabulary().encode(words)


ANSWER = [
    *(CHANNEL, *text("analysis"), MESSAGE, *text("Thinking."), END, START, *text("assistant")),
    *(CHANNEL, *text("final"), MESSAGE, *text("Hello there"), RETURN),
]
CALLING = [
    *(CHANNEL, *text("commentary to=functions.clock "), CONSTRAIN, *text("json"), MESSAGE),
    *(*text('{"zone":"UTC"}'), CALL),
]
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}},
}


class Scripted:
    """An LLM over scripts, with the engine at hand to look at."""

    def __init__(self, *scripts: Any, **settings: Any) -> None:
        self.engine: ScriptedEngine

        def make() -> ScriptedEngine:
            self.engine = ScriptedEngine(scripts, **settings)
            return self.engine

        self.llm = LLM.from_engine(make)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("llm") / "tiny", vocabulary_size=500)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[LLM]:
    with LLM(tiny, context_length=256, max_sequences=4, max_batch_tokens=64, threads=1) as opened:
        yield opened


# With a checkpoint


def test_logits_choose_the_greedy_tokens(llm: LLM) -> None:
    """logits() and generate() are two ways through the engine; they must tell of one model."""
    prompt = [5, 17, 400, 3]
    (completion,) = llm.generate(prompt, GREEDY)
    answer = [token.token_id for token in completion.tokens]
    assert len(answer) == 12 and completion.finish_reason == "length"
    logits_TV = llm.logits([*prompt, *answer])
    assert logits_TV.shape == (16, 500) and logits_TV.dtype == np.float32
    assert logits_TV.argmax(axis=1)[3:-1].tolist() == answer


def test_logprobs_are_those_of_the_logits(llm: LLM) -> None:
    prompt = [5, 17, 400, 3]
    (completion,) = llm.generate(prompt, SamplingParams(max_tokens=1, logprobs=3, seed=4, ignore_stop=True))
    logits_V = llm.logits(prompt)[-1].astype(np.float64)
    logprob_V = logits_V - logits_V.max() - np.log(np.exp(logits_V - logits_V.max()).sum())
    (token,) = completion.tokens
    assert token.logprob == pytest.approx(logprob_V[token.token_id], abs=1e-3)
    assert [token_id for token_id, _ in token.top_logprobs] == np.argsort(-logprob_V)[:3].tolist()


def test_many_prompts_together_give_what_each_gives_alone(llm: LLM) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 500, size).tolist() for size in (1, 3, 40, 90, 7, 22, 5, 64, 2, 11, 33)]
    together = llm.generate(prompts, GREEDY)
    assert [list(completion.prompt_token_ids) for completion in together] == prompts
    assert len({completion.tokens for completion in together}) > 3
    for prompt, completion in zip(prompts[:4], together[:4], strict=True):
        (alone,) = llm.generate([prompt], GREEDY)
        assert alone.tokens == completion.tokens


def test_each_prompt_has_its_own_sampling(llm: LLM) -> None:
    wishes = [SamplingParams(max_tokens=n, ignore_stop=True) for n in (1, 4)]
    assert [len(done.tokens) for done in llm.generate([[1], [2]], wishes)] == [1, 4]
    with pytest.raises(RequestError, match="2 prompts and 1 sampling"):
        llm.generate([[1], [2]], wishes[:1])


def test_the_same_seed_gives_the_same_answer(llm: LLM) -> None:
    wish = SamplingParams(seed=9, max_tokens=20, ignore_stop=True)
    first, second = llm.generate([[8, 9], [8, 9]], wish)
    assert first.tokens == second.tokens
    other = llm.generate([8, 9], SamplingParams(seed=10, max_tokens=20, ignore_stop=True))[0]
    assert other.tokens != first.tokens


def test_prompts_may_be_arrays_tuples_or_lists(llm: LLM) -> None:
    expected = llm.generate([[3, 4]], GREEDY)[0].tokens
    for prompt in ((3, 4), np.array([3, 4]), [np.int64(3), 4]):
        assert llm.generate(prompt, GREEDY)[0].tokens == expected
    assert llm.generate([]) == []


def test_stream_tokens_gives_the_tokens_of_generate(llm: LLM) -> None:
    events = list(llm.stream_tokens([7, 7, 7], GREEDY))
    assert events[-1].finish_reason == "length"
    tokens = tuple(token for event in events for token in event.tokens)
    assert tokens == llm.generate([7, 7, 7], GREEDY)[0].tokens


def test_leaving_a_stream_gives_its_blocks_back(llm: LLM) -> None:
    endless = SamplingParams(temperature=0.0, ignore_stop=True)
    for event in llm.stream_tokens([9] * 30, endless):
        assert event.tokens
        break
    # The next request is served after the abort, so what the engine says afterwards includes it.
    llm.generate([1], GREEDY)
    statistics = llm._engine.statistics  # type: ignore[attr-defined]
    assert statistics.finished["aborted"] >= 1


def test_several_threads_share_one_model(llm: LLM) -> None:
    prompts = [[n, n + 1, 3] for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda prompt: llm.generate(prompt, GREEDY)[0].tokens, prompts))
    assert found == [completion.tokens for completion in llm.generate(prompts, GREEDY)]


def test_errors_of_requests_name_what_is_wrong(llm: LLM) -> None:
    with pytest.raises(PromptTooLong, match="257 tokens; the context is 256"):
        llm.logits([1] * 257)
    with pytest.raises(PromptTooLong, match="300 tokens"):
        llm.generate([[1], [1] * 300], GREEDY)
    with pytest.raises(RequestError, match="500; expected 0 to 499"):
        llm.generate([499, 500])
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[1], []])
    with pytest.raises(RequestError, match="empty"):
        llm.logits([])
    with pytest.raises(RequestError, match=r"prompts\[1\] is a float"):
        llm.generate([[1], 2.5])  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"holds 1\.5"):
        llm.generate(np.array([1.5]))
    with pytest.raises(RequestError, match="prompts is a bytes"):
        llm.generate(b"bytes")
    with pytest.raises(RequestError, match="prompts is a NoneType"):
        llm.generate(None)  # type: ignore[arg-type]


def test_works_where_an_event_loop_runs(llm: LLM) -> None:
    async def notebook_cell() -> int:
        return len(llm.generate([1, 2], GREEDY)[0].tokens)

    assert asyncio.run(notebook_cell()) == 12


def test_closed_model_refuses(tiny: Path) -> None:
    with LLM(tiny, context_length=64, threads=1) as opened:
        assert opened.info.context_length == 64
    opened.close()
    with pytest.raises(EngineClosed, match="not open"):
        opened.generate([1])
    with pytest.raises(EngineClosed, match="not open"):
        list(opened.stream_tokens([1]))


def test_progress_tells_of_the_load(tiny: Path) -> None:
    told: list[tuple[int, int]] = []
    with LLM(tiny, context_length=64, threads=1, progress=lambda done, total: told.append((done, total))):
        assert told and told[-1][0] == told[-1][1] > 0
        assert told == sorted(told)


def test_a_dropped_model_leaves_no_thread(tiny: Path) -> None:
    before = set(threading.enumerate())
    opened = LLM(tiny, context_length=64, threads=1)
    assert len(set(threading.enumerate()) - before) >= 2
    del opened
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("harmonium"):
            thread.join(5)
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not any(name.startswith("harmonium") for name in left)


def test_wrong_paths_and_settings_are_errors_of_our_tree(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        LLM(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        LLM(tmp_path)
    with pytest.raises(ConfigError, match=r"no setting .thread.; did you mean threads\?"):
        LLM(tmp_path, thread=2)
    with pytest.raises(ConfigError, match=r"threads is 'two'; expected a whole number from 1 to 256"):
        LLM(tmp_path, threads="two")
    with pytest.raises(ConfigError, match="path is a NoneType"):
        LLM(None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="context_length is 0"):
        LLM(tmp_path, context_length=0)


def test_settings_come_from_the_call_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARMONIUM_THREADS", "3")
    monkeypatch.setenv("HARMONIUM_ISA", "scalar")
    assert engine_config({}) == EngineConfig(threads=3, isa="scalar")
    assert engine_config({"threads": 5}) == EngineConfig(threads=5, isa="scalar")


# With scripts: chat


def test_chat_gives_reasoning_content_and_usage() -> None:
    played = Scripted(ANSWER)
    with played.llm as llm:
        result = llm.chat("Hi", reasoning_effort="high")
    assert (result.reasoning, result.content, result.finish_reason) == ("Thinking.", "Hello there", "stop")
    assert result.usage.completion_tokens == len(ANSWER)
    prompt = vocabulary().decode(played.engine.requests[0].token_ids)
    assert "Reasoning: high" in prompt
    assert "<|start|>user<|message|>Hi<|end|>" in prompt
    assert "Current date: 20" in prompt


def test_every_argument_of_chat_reaches_the_prompt() -> None:
    played = Scripted(ANSWER)
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "<|end|> What time is it?"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "And now?"},
    ]
    with played.llm as llm:
        llm.chat(
            messages,
            tools=[CLOCK, Tool("calendar", "Looks up days.")],
            reasoning_effort="low",
            instructions="Be brief.",
            builtin_tools=["python"],
            current_date="2026-11-25",
            sampling=SamplingParams(max_tokens=99),
        )
        (request,) = played.engine.requests
        prompt = vocabulary().decode(request.token_ids)
        for part in (
            "Reasoning: low",
            "Current date: 2026-11-25",
            "Be brief.\n\nBe kind.",
            "type clock",
            "type calendar",
            "## python",
            "Noon.",
            "And now?",
        ):
            assert part in prompt, part
        assert request.sampling.max_tokens == 99
        llm.chat([Message("user", "hello")], current_date="")
        assert "Current date" not in vocabulary().decode(played.engine.requests[1].token_ids)


def test_chat_returns_tool_calls() -> None:
    with Scripted(CALLING).llm as llm:
        result = llm.chat("What time is it?", tools=[CLOCK])
    assert result.finish_reason == "tool_calls"
    assert [(call.name, call.arguments) for call in result.tool_calls] == [("clock", '{"zone":"UTC"}')]


def test_stream_tells_the_same_as_chat() -> None:
    played = Scripted(ANSWER)
    with played.llm as llm:
        events = list(llm.stream("Hi"))
        whole = llm.chat("Hi")
    assert isinstance(events[0], TurnStarted) and isinstance(events[-1], Finish)
    assert "".join(event.text for event in events if isinstance(event, ContentDelta)) == whole.content


def test_leaving_a_chat_stream_aborts_it() -> None:
    played = Scripted([7] * 5000, seconds_per_event=0.001)
    with played.llm as llm:
        for event in llm.stream("Hi"):
            if not isinstance(event, TurnStarted):
                break
        assert list(llm.stream_tokens([1], SamplingParams(max_tokens=1)))
        assert played.engine.running == 0
        assert played.engine.finished[0] == "aborted"


def test_wrong_chat_input_is_refused_before_the_engine_sees_it() -> None:
    played = Scripted(ANSWER)
    with played.llm as llm:
        with pytest.raises(HarmonyError, match="reasoning effort is 'extreme'"):
            llm.chat("Hi", reasoning_effort="extreme")
        with pytest.raises(HarmonyError, match="robot"):
            llm.chat([{"role": "robot", "content": "x"}])
        with pytest.raises(HarmonyError, match="mixes Message objects"):
            llm.chat([Message("user", "a"), {"role": "user", "content": "b"}])  # type: ignore[arg-type]
        with pytest.raises(HarmonyError, match="built-in tool is 'shell'"):
            llm.chat("Hi", builtin_tools=["shell"])
        with pytest.raises(HarmonyError, match=r"tools\[1\]"):
            llm.chat("Hi", tools=[CLOCK, {"type": "web_search"}])
        assert played.engine.requests == []


def test_failures_of_the_engine_are_raised() -> None:
    with Scripted(Script((1, 2), error="out of luck")).llm as llm:
        with pytest.raises(EngineError, match="out of luck"):
            llm.chat("Hi")
        with pytest.raises(EngineError, match="out of luck"):
            llm.generate("Hi")
        with pytest.raises(EngineError, match="out of luck"):
            list(llm.stream_tokens("Hi"))
        (*_, last) = llm.stream("Hi")
        assert isinstance(last, Finish) and last.finish_reason == "error"
        with pytest.raises(EngineError, match="scripted engine gives no logits"):
            llm.logits([1])


def test_one_failing_prompt_aborts_the_others() -> None:
    def script(request: Request) -> Script:
        return Script((), error="bad") if request.token_ids == (2,) else Script((7,) * 5000)

    made: list[ScriptedEngine] = []

    def make() -> ScriptedEngine:
        made.append(ScriptedEngine(script, seconds_per_event=0.001))
        return made[0]

    with LLM.from_engine(make) as llm:
        with pytest.raises(EngineError, match="bad"):
            llm.generate([[1], [2], [3]], SamplingParams(ignore_stop=True))
        assert made[0].running == 0


def test_any_number_of_prompts_fits_a_small_engine() -> None:
    played = Scripted([1, 2, 3], max_running=16, info=EngineInfo("small", 100, 1000, "scripted"))
    with played.llm as llm:
        assert len(llm.generate([[n] for n in range(100)])) == 100
        assert repr(llm) == "<LLM small, context 100, scripted engine>"


def test_a_stream_keeps_its_model_open() -> None:
    def events() -> Iterator[Any]:
        return Scripted([7, 8, 9]).llm.stream_tokens([1])

    stream = events()
    gc.collect()
    assert sum(len(event.tokens) for event in stream) == 3


def test_a_stream_that_outlives_its_model_says_so() -> None:
    played = Scripted([7] * 1000)
    stream = played.llm.stream_tokens([1])
    next(stream)
    played.llm.close()
    with pytest.raises(EngineClosed):
        next(stream)
    assert played.engine.running == 0


def test_closing_ends_what_other_threads_wait_for() -> None:
    played = Scripted([7] * 100_000, seconds_per_event=0.001)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(played.llm.chat, "Hi")
        for _ in played.llm.stream_tokens("wait until both run", SamplingParams(max_tokens=30)):
            pass
        played.llm.close()
        with pytest.raises((EngineClosed, EngineError)):
            waiting.result(10)


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.chat(None),
        lambda llm: llm.chat(5),
        lambda llm: llm.chat({"role": "user", "content": "x"}),
        lambda llm: llm.chat("x", tools=5),
        lambda llm: llm.chat("x", tools={"name": "f"}),
        lambda llm: llm.chat("x", instructions=5),
        lambda llm: llm.chat("x", current_date=5),
        lambda llm: llm.chat("x", sampling={"seed": 1}),
        lambda llm: list(llm.stream(5)),
        lambda llm: llm.generate("x", 5),
        lambda llm: llm.generate(["x"], [None, None]),
        lambda llm: llm.generate(["x"], {"max_tokens": 5}),
        lambda llm: list(llm.stream_tokens("x", 5)),
    ],
)
def test_argument_of_a_wrong_type_is_an_error_of_our_tree(call: Any) -> None:
    with Scripted(ANSWER).llm as llm, pytest.raises((HarmonyError, RequestError)):
        call(llm)


def test_none_means_no_tools_and_the_default_settings() -> None:
    with Scripted(ANSWER, ANSWER).llm as llm:
        assert llm.chat("Hi", tools=None, builtin_tools=None, sampling=None).content == "Hello there"
        assert len(llm.generate(["Hi"], [None])) == 1


def test_step_after_a_file_was_shortened_is_an_error_and_not_the_end(tmp_path: Path) -> None:
    folder = make_tiny_checkpoint(tmp_path / "model", vocabulary_size=64)
    with LLM(folder, context_length=64, threads=1) as llm:
        assert llm.logits([1, 2]).shape == (2, 64)
        os.truncate(folder / "model.safetensors", 4096)
        with pytest.raises(EngineError, match="shortened"):
            llm.generate([[1, 2]])
