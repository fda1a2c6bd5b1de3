"""`harmonium chat MODEL`: the conversation on a terminal, or line by line through a pipe.

The loop reads a line, answers it, says how fast that was. It runs outside asyncio, so that the input line
and the answer each have the event loop, and Ctrl-C, to themselves: at the input it empties the line,
during an answer it stops the answer.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Generator
from contextlib import aclosing, contextmanager

from harmonium.chat import ChatRequest, stream_chat
from harmonium.chat_events import (
    ChatEvent,
    ChatResult,
    ContentDelta,
    MessageEnded,
    MessageStarted,
    ReasoningDelta,
    ResultBuilder,
    ToolArgumentsDelta,
    ToolCallStarted,
)
from harmonium.chat_session import ChatSession
from harmonium.engine.protocol import Engine
from harmonium.errors import HarmoniumError, PromptTooLong
from harmonium.harmony.parse import Diagnostic
from harmonium.input_line import LineSource, TerminalSource
from harmonium.screen import Region, Screen


class AnswerView:
    """Shows one answer while it comes: reasoning in a region that folds, or dimmed in full; text as it is."""

    def __init__(self, screen: Screen, shows_reasoning: bool) -> None:
        self._screen = screen
        self._shows_reasoning = shows_reasoning
        self._region: Region | None = None
        self._reasoning_since = 0.0
        self._num_reasoning = 0

    def show(self, event: ChatEvent) -> None:
        """Take the next event of the turn."""
        match event:
            case MessageStarted(kind="reasoning"):
                self._open_reasoning()
            case MessageStarted() | ToolCallStarted():
                self._screen.end_line()
                if isinstance(event, ToolCallStarted):
                    self._screen.line(f"▸ calls {event.recipient}, which nobody here offers")
            case ReasoningDelta():
                self._num_reasoning += len(event.tokens)
                self._reason(event.text)
            case MessageEnded(kind="reasoning"):
                self.fold()
            case ContentDelta():
                self._screen.write(event.text)
            case ToolArgumentsDelta():
                self._screen.dim(event.text)
            case Diagnostic():
                self._screen.line(
                    f"▸ malformed output ({event.code}){': ' if event.text else ''}{event.text}"
                )

    def _open_reasoning(self) -> None:
        self._reasoning_since = time.monotonic()
        self._num_reasoning = 0
        self._screen.end_line()
        if self._screen.is_terminal and not self._shows_reasoning:
            self._region = self._screen.region()

    def _reason(self, text: str) -> None:
        if self._region is not None:
            self._region.add(text)
        elif self._shows_reasoning:
            self._screen.dim(text)

    def fold(self) -> None:
        """End the reasoning in progress, if any: one line stays of what was not to be shown."""
        if self._region is not None:
            self._region.clear()
            seconds = time.monotonic() - self._reasoning_since
            self._screen.line(f"▸ reasoning, {self._num_reasoning:,} tokens, {seconds:.1f} s")
            self._region = None
        self._screen.end_line()


class Interactive:
    """The loop: read, answer, report. `run` blocks until the user ends it."""

    def __init__(
        self,
        engine: Engine,
        session: ChatSession,
        screen: Screen,
        source: LineSource | TerminalSource | None = None,
    ) -> None:
        """source: where lines come from; None asks stdin what it is."""
        self._engine = engine
        self._session = session
        self._screen = screen
        self._source = source or self._standard_source()
        self._loop = asyncio.new_event_loop()

    def _standard_source(self) -> LineSource | TerminalSource:
        if sys.stdin.isatty() and sys.stdout.isatty():
            return TerminalSource(on_toggle=lambda: self._screen.line(self._session.toggle_reasoning()))
        return LineSource(sys.stdin)

    def run(self) -> None:
        """Talk until Ctrl-D, the end of the input or /quit; then close the engine."""
        try:
            while not self._session.has_quit:
                try:
                    line = self._source.read()
                except EOFError:
                    return
                except KeyboardInterrupt:
                    if isinstance(self._source, LineSource):
                        raise
                    self._screen.line("Ctrl-D or /quit ends the chat")
                    continue
                self._take(line)
        finally:
            self._loop.run_until_complete(self._engine.close())
            self._loop.close()

    def _take(self, line: str) -> None:
        """A command, or something to answer. A mistake costs one line."""
        if not line.strip():
            return
        try:
            if line.startswith("/"):
                told = self._session.command(line.rstrip())
                if told:
                    self._screen.line(told)
            else:
                self._answer(line.strip())
        except PromptTooLong as error:
            self._screen.line(f"the context is full: {error}; {_CONTEXT_ADVICE}")
        except HarmoniumError as error:
            self._screen.line(str(error))

    def _answer(self, text: str) -> None:
        task = self._loop.create_task(answer(self._engine, self._session, text, self._screen))
        with _interrupts_cancel(self._loop, task):
            self._loop.run_until_complete(task)


_CONTEXT_ADVICE = "/save keeps the conversation, /clear starts a new one, --context-length gives more room"


@contextmanager
def _interrupts_cancel(
    loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]
) -> Generator[None, None, None]:
    """While this lasts, Ctrl-C cancels the task. Where signals cannot be had (not the main thread) nothing
    changes.
    """
    try:
        loop.add_signal_handler(signal.SIGINT, task.cancel)
    except (NotImplementedError, RuntimeError, ValueError):
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


async def answer(engine: Engine, session: ChatSession, text: str, screen: Screen) -> None:
    """Stream the answer to `text`, remember both, report. Cancelling stops the answer and remembers what
    there is.

    Raises what `stream_chat` raises; then nothing is remembered.
    """
    view = AnswerView(screen, session.shows_reasoning)
    builder = ResultBuilder()
    clock = _Clock()
    is_stopped = False
    request = session.request(text)
    try:
        async with aclosing(stream_chat(engine, request)) as events:
            async for event in events:
                builder.push(event)
                view.show(event)
                clock.tick(event)
    except asyncio.CancelledError:
        is_stopped = True
    finally:
        view.fold()
    result = builder.result()
    if result.error is not None:
        raise result.error
    session.record(text, result)
    screen.line(summary(engine, request, result, clock, is_stopped))


class _Clock:
    """When the tokens of an answer came. num_tokens: those after the first event, which came at once."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.first: float | None = None
        self.last = self.started
        self.num_tokens = 0

    def rate(self) -> float | None:
        """Tokens a second after the first; None where there is nothing to measure."""
        if self.first is None or self.last <= self.first:
            return None
        return self.num_tokens / (self.last - self.first)

    def tick(self, event: ChatEvent) -> None:
        if isinstance(event, (ContentDelta, ReasoningDelta)):
            self.last = time.monotonic()
            if self.first is None:
                self.first = self.last
            else:
                self.num_tokens += len(event.tokens)


def summary(engine: Engine, request: ChatRequest, result: ChatResult, clock: _Clock, is_stopped: bool) -> str:
    """One line after an answer: how it ended if not as it should, tokens, speed, the context used."""
    parts = ["stopped"] if is_stopped else _bad_ending(engine, request, result)
    parts.append(f"{result.usage.completion_tokens:,} tokens")
    rate = clock.rate()
    if rate is not None and clock.first is not None:
        parts.append(f"{rate:.1f} tokens/s")
        parts.append(f"first after {clock.first - clock.started:.1f} s")
    parts.append(f"context {result.usage.total_tokens:,} of {engine.info.context_length:,}")
    return ", ".join(parts)


def _bad_ending(engine: Engine, request: ChatRequest, result: ChatResult) -> list[str]:
    if result.finish_reason == "stop":
        return []
    if result.finish_reason != "length":
        return [f"ended: {result.finish_reason}"]
    if result.usage.total_tokens >= engine.info.context_length:
        return [f"cut off: the context is full ({_CONTEXT_ADVICE})"]
    if result.usage.completion_tokens == request.sampling.max_tokens:
        return ["cut off at --max-tokens"]
    return ["cut off"]
