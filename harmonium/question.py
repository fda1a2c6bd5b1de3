"""`harmonium chat MODEL "question"`: one answer, made for pipes: content on stdout, all else on stderr."""

from __future__ import annotations

from contextlib import aclosing

from harmonium.chat import ChatRequest, stream_chat
from harmonium.chat_events import (
    ChatResult,
    ContentDelta,
    MessageEnded,
    MessageStarted,
    ReasoningDelta,
    ResultBuilder,
)
from harmonium.engine.protocol import Engine
from harmonium.errors import EngineError
from harmonium.screen import Screen


async def ask(
    engine: Engine, request: ChatRequest, content: Screen | None, reasoning: Screen | None
) -> ChatResult:
    """Stream the answer; each part to its screen, None for a part that is not to be shown.

    Raises what `stream_chat` raises, and the engine's error where it failed on the way.
    """
    builder = ResultBuilder()
    async with aclosing(stream_chat(engine, request)) as events:
        async for event in events:
            builder.push(event)
            match event:
                case ReasoningDelta() if reasoning is not None:
                    reasoning.dim(event.separator + event.text)
                case ContentDelta() if content is not None:
                    content.write(event.separator + event.text)
                case MessageEnded(kind="reasoning") | MessageStarted() if reasoning is not None:
                    reasoning.end_line()
    if content is not None:
        content.end_line()
    result = builder.result()
    if result.finish_reason == "error":
        raise result.error or EngineError("the engine failed without saying why")
    return result


def note(result: ChatResult) -> str | None:
    """What a reader of the content alone should know: that it is cut off, or that there is none."""
    if result.finish_reason == "length":
        return f"the answer is cut off after {result.usage.completion_tokens:,} tokens"
    if result.finish_reason != "stop":
        return f"the answer ended early: {result.finish_reason}"
    if not result.content:
        problems = ", ".join(dict.fromkeys(diagnostic.code for diagnostic in result.diagnostics))
        return f"the model gave no answer{f' ({problems})' if problems else ''}"
    return None


def result_json(result: ChatResult, model_name: str) -> dict[str, object]:
    """As `--json` prints it."""
    usage = result.usage
    return {
        "model": model_name,
        "content": result.content,
        "reasoning": result.reasoning,
        "tool_calls": [
            {"id": call.call_id, "name": call.name, "arguments": call.arguments, "declared": call.is_declared}
            for call in result.tool_calls
        ],
        "finish_reason": result.finish_reason,
        "usage": {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        "token_ids": list(result.token_ids),
        "diagnostics": [{"code": item.code, "text": item.text} for item in result.diagnostics],
    }
