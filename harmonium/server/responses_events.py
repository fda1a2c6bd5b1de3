"""Chat events of a turn -> the streaming events of the Responses API, and the object that they end with.

    events = ResponseEvents(facts, seal, now)
    for event in events.begin(): ...           # created, in_progress
    for chat_event in turn:
        for event in events.push(chat_event): ...
    events.response                            # of the terminal event

Laws: sequence_number counts from 0 without gaps; an item's id stays; output_index counts items; whatever is
opened is closed; the last event, and only it, is one of response.completed, .incomplete, .failed. A response
that is not streamed is the `response` of the same events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harmonium.chat_events import (
    ChatEvent,
    ContentDelta,
    Finish,
    MessageEnded,
    MessageStarted,
    ReasoningDelta,
    ToolArgumentsDelta,
    ToolCallEnded,
    ToolCallStarted,
    Usage,
)
from harmonium.errors import HarmoniumError
from harmonium.harmony.messages import Message
from harmonium.harmony.parse import Diagnostic
from harmonium.server.errors import api_error
from harmonium.server.responses_items import Entry
from harmonium.server.responses_object import Outcome, ResponseFacts, ResponseStatus, response_object
from harmonium.server.responses_output import (
    CustomCallItem,
    FunctionCallItem,
    Json,
    MessageItem,
    OutputItem,
    ReasoningItem,
)
from harmonium.server.responses_seal import Seal
from harmonium.server.turns import check_finish

TERMINAL_TYPES = frozenset({"response.completed", "response.incomplete", "response.failed"})


class ResponseEvents:
    """Writes the events of one response.

    now: gives seconds since 1970. response: the object as it stands. entries: the turn for the history, in
    order. failure: why it failed, if it did.
    """

    def __init__(self, facts: ResponseFacts, seal: Seal, now: Callable[[], float]) -> None:
        self._facts = facts
        self._seal = seal
        self._now = now
        self._sequence_number = 0
        self._output: list[Json] = []
        self._open: OutputItem | None = None
        self._diagnostics: list[Json] = []
        self._usage: Usage | None = None
        self.failure: BaseException | None = None
        self.entries: list[Entry] = []
        self.response = response_object(
            facts, Outcome("queued" if facts.request.background else "in_progress")
        )

    @property
    def is_over(self) -> bool:
        """Whether the terminal event was written."""
        return self.response["status"] not in ("queued", "in_progress")

    def begin(self) -> Iterator[Json]:
        """The events before the first item."""
        yield self._stamped({"type": "response.created", "response": self.response})
        if self._facts.request.background:
            yield self._stamped({"type": "response.queued", "response": self.response})
        self.response = response_object(self._facts, Outcome("in_progress"))
        yield self._stamped({"type": "response.in_progress", "response": self.response})

    def push(self, event: ChatEvent) -> Iterator[Json]:
        """The events that this one causes."""
        for written in self._translate(event):
            yield self._stamped(written)

    def fail(self, error: BaseException) -> Iterator[Json]:
        """The turn failed outside of its events: close what is open and end with response.failed."""
        yield from self._end("failed", error)

    def cancel(self) -> Iterator[Json]:
        """Somebody cancelled the response: it ends with response.incomplete, its status is cancelled."""
        yield from self._end("cancelled", None)

    def _stamped(self, event: Json) -> Json:
        number = self._sequence_number
        self._sequence_number += 1
        return {"type": event["type"], "sequence_number": number, **event}

    def _translate(self, event: ChatEvent) -> list[Json]:
        match event:
            case MessageStarted() | ToolCallStarted():
                return self._start(event)
            case ReasoningDelta() | ContentDelta():
                assert self._open is not None, "text comes after its message began"
                return self._open.delta(event.text, event.tokens)
            case ToolArgumentsDelta():
                assert self._open is not None, "arguments come after their call began"
                return self._open.delta(event.text, ())
            case MessageEnded() | ToolCallEnded():
                return self._close(event)
            case Diagnostic():
                self._diagnostics.append({"code": event.code, "text": event.text})
            case Finish():
                self._usage = event.usage
                return self._finish(event)
        return []

    def _start(self, event: MessageStarted | ToolCallStarted) -> list[Json]:
        self._open = item = self._new_item(event)
        return item.open()

    def _new_item(self, event: MessageStarted | ToolCallStarted) -> OutputItem:
        response_id, index = self._facts.response_id, len(self._output)
        request = self._facts.request
        if isinstance(event, MessageStarted):
            if event.kind == "reasoning":
                return ReasoningItem(
                    response_id, index, self._seal if request.wants_sealed_reasoning else None
                )
            return MessageItem(response_id, index, event.channel, request.num_logprobs is not None)
        tool = self._facts.tools.entry(event.name) if event.is_declared else None
        if tool is not None and tool.kind == "custom":
            return CustomCallItem(response_id, index, event.call_id, tool)
        return FunctionCallItem(response_id, index, event.call_id, event.name, tool)

    def _close(self, event: MessageEnded | ToolCallEnded) -> list[Json]:
        assert self._open is not None, "an item ends after it began"
        events = self._open.close(event.message, event.is_complete)
        item = events[-1]["item"]
        self._output.append(item)
        self._open = None
        call_id = event.call_id if isinstance(event, ToolCallEnded) else None
        if (
            call_id is None or event.is_complete
        ):  # a call that was cut off gets no result, so it is no history
            self.entries.append(Entry(event.message, item["id"], call_id))
        return events

    def _finish(self, event: Finish) -> list[Json]:
        try:
            check_finish(event)
        except HarmoniumError as error:
            return [self._terminal("failed", error)]
        return [self._terminal("incomplete" if event.finish_reason == "length" else "completed")]

    def _end(self, status: ResponseStatus, error: BaseException | None) -> Iterator[Json]:
        if self._open is not None:
            # The turn is gone without an end of this item: it shows what had come.
            events = self._open.close(Message("assistant", self._open.text, channel="analysis"), False)
            self._output.append(events[-1]["item"])
            self._open = None
            for event in events:
                yield self._stamped(event)
        yield self._stamped(self._terminal(status, error))

    def _terminal(self, status: ResponseStatus, error: BaseException | None = None) -> Json:
        self.failure = error
        outcome = Outcome(
            status=status,
            output=tuple(self._output),
            usage=self._usage,
            error=_error_object(error),
            incomplete_reason="max_output_tokens" if status == "incomplete" else None,
            completed_at=int(self._now()) if status == "completed" else None,
            diagnostics=tuple(self._diagnostics),
        )
        self.response = response_object(self._facts, outcome)
        kind = "incomplete" if status == "cancelled" else status
        return {"type": f"response.{kind}", "response": self.response}


def _error_object(error: BaseException | None) -> Json | None:
    """{code, message}. "server_error" is the API's one code for the failure of an engine."""
    return None if error is None else {"code": "server_error", "message": str(api_error(error))}
