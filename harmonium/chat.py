"""Harmony meets an engine: a conversation goes in, the events of the model's turn come out.

    async with aclosing(stream_chat(engine, request)) as events:     # leaving the block aborts the request
        async for event in events: ...
    result = await complete_chat(engine, request)                   # the same events, folded

Whatever the model writes, a turn ends with exactly one `Finish`; output that breaks the format becomes
`Diagnostic`s. What the request itself does wrong is raised before the first event.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from harmonium.chat_events import (
    ChatEvent,
    ChatFinishReason,
    ChatResult,
    ContentDelta,
    Finish,
    MessageEnded,
    MessageStarted,
    ReasoningDelta,
    ResultBuilder,
    ToolArgumentsDelta,
    ToolCallEnded,
    ToolCallStarted,
    TurnStarted,
    Usage,
)
from harmonium.engine.protocol import Engine, FinishReason, Request, Token, TokenEvent
from harmonium.errors import EngineError, HarmoniumError, RequestError
from harmonium.harmony.grammar import TurnRules, compile_turn
from harmonium.harmony.messages import Conversation
from harmonium.harmony.parse import Diagnostic, Event, MessageEnd, MessageStart, StreamParser, TextDelta
from harmonium.harmony.render import render_prompt
from harmonium.harmony.vocabulary import NUM_TEXT_TOKENS, STOP_TOKEN_IDS, vocabulary
from harmonium.model.batch import SamplingParams
from harmonium.stop_text import StopText, TextPiece


def _new_id() -> str:
    return f"chat-{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One turn to be written by the model.

    conversation: messages, tools, effort, date, identity: everything that the prompt is made of.
    stop_token_ids: end the turn too, besides <|return|> and <|call|>; a text token among them is no part
    of the answer. cache_salt: turns share cached prefixes only with the same salt. request_id: names the
    turn; ids of its tool calls derive from it. stop: texts that end the turn when a message for the user
    holds one; neither it nor what follows is shown. Reasoning and calls are not looked at. grammar: what the
    turn has to keep to beside the conversation's tools; None: the model writes what it likes. adapter: the
    LoRA adapter that writes it, by its name in the engine; None: the model as it is. Raises RequestError for
    an empty stop text, and for sampling.ignore_stop: what comes after a turn is no chat.
    """

    conversation: Conversation
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stop_token_ids: frozenset[int] = frozenset()
    cache_salt: str = ""
    request_id: str = field(default_factory=_new_id)
    stop: tuple[str, ...] = ()
    grammar: TurnRules | None = field(default_factory=TurnRules)
    adapter: str | None = None

    def __post_init__(self) -> None:
        if not all(self.stop):
            raise RequestError("stop holds an empty text; expected at least one character")
        if self.sampling.ignore_stop:
            raise RequestError("ignore_stop is set; a chat turn ends at its stop token")


async def complete_chat(engine: Engine, request: ChatRequest) -> ChatResult:
    """The whole turn. Raises what `stream_chat` raises; a failure on the way is finish_reason "error"."""
    builder = ResultBuilder()
    async with aclosing(stream_chat(engine, request)) as events:
        async for event in events:
            builder.push(event)
    return builder.result()


async def stream_chat(engine: Engine, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
    """The events of the turn, the last of them `Finish`. Closing the generator aborts the engine's request.

    Raises before the first event: HarmonyError for a conversation that cannot be rendered, RequestError for a
    grammar that cannot be enforced, and what `Engine.admit` raises (PromptTooLong, RequestError, EngineBusy,
    EngineClosed).
    """
    engine_request, warnings = await asyncio.to_thread(_prepare, request)  # may take long
    engine.admit(engine_request)
    yield TurnStarted(request.request_id, len(engine_request.token_ids), warnings)
    turn = _Turn(request, len(engine_request.token_ids))
    try:
        async with aclosing(engine.generate(engine_request)) as token_events:
            async for token_event in token_events:
                for event in turn.push(token_event):
                    yield event
                if turn.is_over:
                    break
    except HarmoniumError as error:
        turn.fail(error)
    for event in turn.end():
        yield event


def _prepare(request: ChatRequest) -> tuple[Request, tuple[str, ...]]:
    """What the engine is asked for, and what the grammar does not enforce."""
    conversation, turn = request.conversation, None
    if request.grammar is not None:
        turn = compile_turn(request.grammar, conversation.tools, conversation.builtin_tools)
    engine_request = Request(
        request_id=request.request_id,
        token_ids=tuple(render_prompt(conversation)),
        sampling=request.sampling,
        stop_token_ids=(STOP_TOKEN_IDS if turn is None else turn.stop_token_ids) | request.stop_token_ids,
        cache_salt=request.cache_salt,
        constraint=turn,
        adapter=request.adapter,
    )
    return engine_request, () if turn is None else tuple(map(str, turn.warnings))


class _Turn:
    """Tokens of one request -> chat events."""

    def __init__(self, request: ChatRequest, prompt_tokens: int) -> None:
        conversation = request.conversation
        tools = {tool.name for tool in conversation.tools}
        names = tools | {namespace.name for namespace in conversation.builtin_tools}
        self._parser = StreamParser(names, 1 if request.grammar is None else request.grammar.max_calls)
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._token_ids: list[int] = []
        self._pending: list[Token] = []
        self._cached_tokens = 0
        self._reasoning_tokens = 0
        self._call_ids: dict[int, str] = {}
        self._declared: set[int] = set()
        self._has_content = False
        self._waits_for_tool = False
        self._hit_own_stop = False
        self._stop_text: StopText | None = None
        self._separator = ""
        self._shown: list[str] = []
        self._engine_reason: FinishReason | None = None
        self._error: HarmoniumError | None = None

    @property
    def is_over(self) -> bool:
        """Whether the turn has ended, be it by the engine's word or by a token after which nothing counts."""
        return self._engine_reason is not None or self._hit_own_stop or self._parser.stopped_by is not None

    def push(self, event: TokenEvent) -> Iterator[ChatEvent]:
        """The events that these tokens cause. Tokens after the end of the turn are dropped."""
        self._cached_tokens = max(self._cached_tokens, event.num_cached_tokens)
        for token in event.tokens:
            if self.is_over:
                return
            yield from self._push_token(token)
        self._engine_reason = event.finish_reason
        if event.finish_reason == "error":
            self._error = EngineError(event.error or "the engine failed without saying why")

    def _push_token(self, token: Token) -> Iterator[ChatEvent]:
        token_id = token.token_id
        self._token_ids.append(token_id)
        is_text = 0 <= token_id < NUM_TEXT_TOKENS
        self._hit_own_stop = token_id in self._request.stop_token_ids
        if self._hit_own_stop and is_text:
            return
        if is_text:
            self._pending.append(token)
        yield from self._translate(self._parser.push(token_id))

    def fail(self, error: HarmoniumError) -> None:
        """The engine raised this on the way."""
        self._engine_reason, self._error = "error", error

    def end(self) -> Iterator[ChatEvent]:
        """Close what is open; then `Finish`."""
        yield from self._translate(self._parser.finish(self._engine_reason or "stop"))
        usage = Usage(self._prompt_tokens, len(self._token_ids), self._reasoning_tokens, self._cached_tokens)
        stop_text = None if self._stop_text is None else self._stop_text.found
        yield Finish(self._finish_reason(), usage, tuple(self._token_ids), self._error, stop_text)

    def _finish_reason(self) -> ChatFinishReason:
        if self._engine_reason in ("aborted", "error"):
            return self._engine_reason
        stopped_by = self._parser.stopped_by
        has_ended = stopped_by in ("return", "call") or self._hit_own_stop
        if (
            stopped_by == "end_of_text"
        ):  # the end of a document, not of a turn: good for an answer, not for nothing
            has_ended = self._has_content or self._waits_for_tool
        if not has_ended:
            return "length"
        return "tool_calls" if self._waits_for_tool else "stop"

    def _translate(self, events: list[Event]) -> Iterator[ChatEvent]:
        starts_with_text = any(isinstance(event, MessageStart) for event in events)
        if starts_with_text and not any(isinstance(event, TextDelta) for event in events):
            self._pending.clear()  # a header's
        for event in events:
            match event:
                case MessageStart():
                    yield self._start(event)
                case TextDelta():
                    yield from self._delta(event, starts_with_text)
                case MessageEnd():
                    yield from self._end_message(event)
                case Diagnostic():
                    yield event

    def _start(self, event: MessageStart) -> ChatEvent:
        if event.kind != "tool_call":
            if event.kind == "content" and self._request.stop:
                self._stop_text, self._shown = StopText(self._request.stop), []
            return MessageStarted(event.index, event.kind, event.channel)
        assert event.tool_name is not None, "a call has a name"
        assert event.recipient is not None, "a call has a recipient"
        digest = hashlib.sha256(f"{self._request.request_id}/{event.index}".encode()).hexdigest()
        call_id = self._call_ids[event.index] = f"call_{digest[:24]}"
        if event.is_declared:
            self._declared.add(event.index)
        return ToolCallStarted(event.index, call_id, event.tool_name, event.recipient, event.is_declared)

    def _delta(self, event: TextDelta, is_from_header: bool) -> Iterator[ChatEvent]:
        tokens = tuple(_last_covering(self._pending, event.text) if is_from_header else self._pending)
        self._pending.clear()
        if event.kind == "tool_call":
            yield ToolArgumentsDelta(event.index, self._call_ids[event.index], event.text)
        elif event.kind == "reasoning":
            self._reasoning_tokens += len(tokens)
            yield ReasoningDelta(event.index, event.text, tokens, event.separator)
        elif self._stop_text is not None:
            self._separator = event.separator or self._separator
            yield from self._show(event.index, self._stop_text.push(event.text, tokens))
            self._hit_own_stop |= self._stop_text.found is not None
        else:
            self._has_content = True
            yield ContentDelta(event.index, event.text, tokens, event.separator)

    def _show(self, index: int, piece: TextPiece | None) -> Iterator[ChatEvent]:
        """Text that was looked at for stop texts."""
        if piece is None:
            return
        self._has_content = True
        self._shown.append(piece.text)
        separator, self._separator = self._separator, ""
        yield ContentDelta(index, piece.text, piece.tokens, separator)

    def _end_message(self, event: MessageEnd) -> Iterator[ChatEvent]:
        self._pending.clear()
        if event.kind == "tool_call":
            self._waits_for_tool |= event.is_complete and event.index in self._declared
            call_id = self._call_ids[event.index]
            yield ToolCallEnded(event.index, call_id, event.message, event.is_complete)
            return
        message, is_complete = event.message, event.is_complete
        if event.kind == "content" and self._stop_text is not None:
            yield from self._show(event.index, self._stop_text.finish())
            if self._stop_text.found is not None:
                message = replace(message, content="".join(self._shown), token_ids=None)
                is_complete = True
        yield MessageEnded(event.index, event.kind, message, is_complete)


def _last_covering(tokens: list[Token], text: str) -> list[Token]:
    """The last tokens whose bytes make up the text: a header without <|message|> holds its message's words
    too.
    """
    missing = len(text.encode())
    for place in range(len(tokens) - 1, -1, -1):
        missing -= len(vocabulary().token_bytes(tokens[place].token_id))
        if missing <= 0:
            return tokens[place:]
    return tokens
