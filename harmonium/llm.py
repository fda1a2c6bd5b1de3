"""The Python API: a model in this process, for scripts, notebooks and tests.

    from harmonium import LLM, SamplingParams

    with LLM("path/to/gpt-oss-20b") as llm:
        print(llm.chat("Why is the sky blue?", reasoning_effort="low").content)
        for completion in llm.generate(["Once upon a time", "In 1969,"], SamplingParams(max_tokens=32)):
            print(completion.text)
        logits = llm.logits(llm.encode("two plus two is"))       # float32 [T, V]

Everything waits for its result and may be called from several threads at once; requests then share steps. The
engine's event loop runs on a thread of its own, so that a loop in the caller's thread (a notebook's) is no
obstacle.
"""

from __future__ import annotations

import asyncio
import os
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from harmonium.background_loop import BackgroundLoop
from harmonium.chat import complete_chat, stream_chat
from harmonium.chat_events import ChatEvent, ChatResult
from harmonium.continuation import Continuation, generate
from harmonium.engine.local import LocalEngine
from harmonium.engine.protocol import Engine, EngineInfo, Request, TokenEvent
from harmonium.errors import ConfigError, EngineClosed, EngineError, RequestError
from harmonium.harmony.messages import Tool
from harmonium.harmony.vocabulary import STOP_TOKEN_IDS, vocabulary
from harmonium.llm_input import (
    ChatMessages,
    Prompt,
    chat_request,
    engine_config,
    read_prompts,
    read_sampling,
    read_token_ids,
    turn_rules,
)
from harmonium.model.batch import SamplingParams

T = TypeVar("T")


class LLM:
    """A gpt-oss model and the engine that serves it; close it, or use it as a context manager.

    Errors are those of harmonium.errors, as the engine raises them: ConfigError, CheckpointError and
    MemoryPlanError when it is made; RequestError and PromptTooLong for a request that cannot work; EngineBusy
    when max_sequences + max_queue requests are here already; EngineClosed after `close`; EngineError.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        progress: Callable[[int, int], None] | None = None,
        **config: Any,
    ) -> None:
        """Open a checkpoint folder and make an engine for it.

        config: fields of EngineConfig, such as weights="bf16", context_length=32768, threads=8, or
        lora={"sql": "adapters/sql"}, the LoRA adapters that requests may name; what is not given comes from
        the environment (HARMONIUM_ISA, HARMONIUM_THREADS), then the defaults. progress: called with (bytes
        done, bytes in all) from another thread while the weights are loaded.

        Raises ConfigError, MemoryPlanError, CheckpointError.
        """
        from harmonium.engine.create import create_engine  # here: only this needs the native kernels

        settings = engine_config(config)
        if not isinstance(path, (str, os.PathLike)):
            raise ConfigError(f"path is a {type(path).__name__}; expected the path of a checkpoint folder")
        folder = Path(path)

        async def create() -> Engine:
            return await asyncio.to_thread(create_engine, folder, settings, progress)

        self._start(create, settings.max_sequences + min(settings.max_sequences, settings.max_queue))

    @classmethod
    def from_engine(cls, make_engine: Callable[[], Engine]) -> LLM:
        """An LLM over any engine, such as a ScriptedEngine. make_engine is called in the LLM's event loop."""

        async def create() -> Engine:
            return make_engine()

        llm = cls.__new__(cls)
        llm._start(create, 16)
        return llm

    def _start(self, create: Callable[[], Any], max_at_once: int) -> None:
        self._loop = BackgroundLoop("harmonium-llm")
        # The engine closes itself when it is dropped; only the loop is left to us.
        self._finalizer = weakref.finalize(self, self._loop.close)
        self._max_at_once = max_at_once
        try:
            self._engine: Engine = self._loop.run(create())
        except BaseException:
            self._finalizer()
            raise

    @property
    def info(self) -> EngineInfo:
        """The model's name, its context length and the size of its vocabulary."""
        return self._engine.info

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as ordinary text: "<|end|>" becomes letters, never the special token."""
        return vocabulary().encode(text)

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens by their names."""
        return vocabulary().decode(token_ids)

    def logits(self, token_ids: Prompt, lora: str | None = None) -> npt.NDArray[np.float32]:
        """The logits after each of T tokens: float32 [T, V], so 0.8 MB a token for the real vocabulary.

        Computed from the first token on, whatever the prefix cache holds. Raises RequestError for no token or
        one outside the vocabulary, PromptTooLong.
        """
        if not isinstance(self._engine, LocalEngine):
            raise EngineError(f"a {self.info.engine} engine gives no logits; the local one does")
        return self._loop.run(self._engine.logits(read_token_ids(token_ids, "token_ids"), lora))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Continuation]:
        """Continue one or many prompts, together as far as the engine allows; the results keep their order.

        prompts: a text, a list of token ids, or a list of texts and lists of ids. No conversation is put
        around
        them: `chat` does that. sampling: for all, or one for each; None: the defaults. An answer ends at the
        models' stop tokens (which are its last token), at max_tokens or where the context is full. lora: the
        adapter to use, for all or one for each; None: the model as it is.

        Raises RequestError for a prompt that is neither text nor token ids or is empty, and for a list of
        settings of another length; PromptTooLong. When one request fails, the others are aborted.
        """
        listed = read_prompts(prompts)
        settings = [read_sampling(one) for one in _one_each(sampling, len(listed), "sampling settings")]
        adapters = _one_each(lora, len(listed), "adapters")
        wanted = list(zip(listed, settings, adapters, strict=True))
        return self._loop.run(_generate_all(self._engine, wanted, self._max_at_once))

    def stream_tokens(
        self, prompt: Prompt, sampling: SamplingParams | None = None, lora: str | None = None
    ) -> Iterator[TokenEvent]:
        """Continue one prompt, token by token; leaving the loop aborts the request.

        Raises, when the first event is asked for, what `generate` raises.
        """
        request = Request(
            f"tokens-{uuid.uuid4().hex}",
            read_token_ids(prompt, "prompt"),
            read_sampling(sampling),
            stop_token_ids=STOP_TOKEN_IDS,
            adapter=lora,
        )
        return self._iterate(_token_events(self._engine, request))

    def chat(
        self,
        messages: ChatMessages,
        *,
        tools: Sequence[Mapping[str, Any] | Tool] | None = None,
        reasoning_effort: str = "medium",
        instructions: str | None = None,
        builtin_tools: Sequence[str] | None = None,
        current_date: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        max_reasoning_tokens: int | None = None,
        grammar: bool = True,
        sampling: SamplingParams | None = None,
        lora: str | None = None,
    ) -> ChatResult:
        """The model's whole turn: reasoning, content, tool_calls, finish_reason, usage.

        messages: a user's text, or messages oldest first. tools: functions that the model may call, as the
        Chat Completions API has them. reasoning_effort: "low", "medium" or "high". instructions: put before
        those of leading system messages. builtin_tools: "browser", "python" (calls are returned, nothing is
        run). current_date: as the model is told it, such as "2026-11-25"; None: today; "": none.
        response_format, tool_choice: as the Chat Completions API has them, and {"type": "grammar", "syntax":
        "lark" or "regex", "definition": ...}; the answer and the calls keep to them (docs/grammar.md).
        max_reasoning_tokens: then reasoning is closed and the answer begins. grammar: False lets the model
        write what it likes, and all of these but the prompt's words for a schema are without effect. lora:
        the adapter that answers, by its name; None: the model as it is.

        Raises HarmonyError for messages or tools that cannot be expressed, RequestError for a format or
        choice that cannot be kept, and what `generate` raises.
        """
        rules = turn_rules(response_format, tool_choice, max_reasoning_tokens) if grammar else None
        request = chat_request(
            messages,
            tools,
            reasoning_effort,
            instructions,
            builtin_tools,
            current_date,
            sampling,
            response_format=response_format,
            rules=rules,
            adapter=lora,
        )
        result = self._loop.run(complete_chat(self._engine, request))
        if result.finish_reason == "error":
            raise result.error or EngineError("the engine failed")
        if result.finish_reason == "aborted":
            raise EngineClosed("the engine was closed before the turn ended")
        return result

    def stream(
        self,
        messages: ChatMessages,
        *,
        tools: Sequence[Mapping[str, Any] | Tool] | None = None,
        reasoning_effort: str = "medium",
        instructions: str | None = None,
        builtin_tools: Sequence[str] | None = None,
        current_date: str | None = None,
        response_format: Mapping[str, Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        max_reasoning_tokens: int | None = None,
        grammar: bool = True,
        sampling: SamplingParams | None = None,
        lora: str | None = None,
    ) -> Iterator[ChatEvent]:
        """The events of the model's turn while it writes (harmonium.chat_events); the last one is `Finish`.

        Leaving the loop aborts the turn. Takes and raises what `chat` does, but what fails on the way is told
        by `Finish`.
        """
        rules = turn_rules(response_format, tool_choice, max_reasoning_tokens) if grammar else None
        request = chat_request(
            messages,
            tools,
            reasoning_effort,
            instructions,
            builtin_tools,
            current_date,
            sampling,
            response_format=response_format,
            rules=rules,
            adapter=lora,
        )
        return self._iterate(stream_chat(self._engine, request))

    def _iterate(self, events: AsyncGenerator[T, None]) -> Iterator[T]:
        # A generator's frame holds the LLM, so that it lives while only its stream is in use.
        yield from self._loop.iterate(events)

    def close(self) -> None:
        """End what runs and give the memory back. A second call does nothing."""
        if self._finalizer.alive:
            try:
                self._loop.run(self._engine.close())
            finally:
                self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        info = self.info
        return f"<LLM {info.model_name}, context {info.context_length:,}, {info.engine} engine>"


def _one_each(given: Any, count: int, what: str) -> list[Any]:
    """A list as it is, anything else once for each prompt. Raises RequestError for another length."""
    each = list(given) if isinstance(given, (list, tuple)) else [given] * count
    if len(each) != count:
        raise RequestError(f"there are {count:,} prompts and {len(each):,} {what}")
    return each


async def _generate_all(
    engine: Engine, wanted: list[tuple[tuple[int, ...], SamplingParams, str | None]], max_at_once: int
) -> list[Continuation]:
    """All answers, at most max_at_once under way, so that any number of prompts may come."""
    room = asyncio.Semaphore(max_at_once)

    async def one(prompt: tuple[int, ...], params: SamplingParams, adapter: str | None) -> Continuation:
        async with room:
            found = await generate(engine, prompt, params, None, adapter)
        if found.finish_reason == "aborted":
            raise EngineClosed("the engine was closed before the answer ended")
        return found

    tasks = [asyncio.create_task(one(*each)) for each in wanted]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _token_events(engine: Engine, request: Request) -> AsyncGenerator[TokenEvent, None]:
    engine.admit(request)
    events = engine.generate(request)
    try:
        async for event in events:
            if event.finish_reason == "error":
                raise EngineError(event.error or "the engine failed")
            yield event
    finally:
        await events.aclose()
