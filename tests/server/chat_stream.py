"""What the chunks of a chat completion add up to."""

from __future__ import annotations

from typing import Any

from openai.types.chat import ChatCompletionChunk


def fold(chunks: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(a choice as an answer in one piece holds it, usage). OpenAI's client must know every chunk."""
    message: dict[str, Any] = {"role": None, "content": None, "refusal": None, "annotations": []}
    choice: dict[str, Any] = {"index": index, "message": message, "logprobs": None, "finish_reason": None}
    usage = None
    assert len({(chunk["id"], chunk["model"], chunk["created"]) for chunk in chunks}) == 1
    for chunk in chunks:
        _check(chunk)
        usage = chunk.get("usage") or usage
        for part in chunk["choices"]:
            if part["index"] == index:
                assert choice["finish_reason"] is None, "nothing comes after the end of a choice"
                _add(choice, part)
    assert choice["finish_reason"] is not None
    return choice, usage


def _check(chunk: dict[str, Any]) -> None:
    is_custom = any(
        call.get("type") == "custom"
        for part in chunk["choices"]
        for call in part["delta"].get("tool_calls", [])
    )
    if not is_custom:  # the client's types know no streamed custom tool
        ChatCompletionChunk.model_validate(chunk, strict=True)


def _add(choice: dict[str, Any], part: dict[str, Any]) -> None:
    message = choice["message"]
    for name, value in part["delta"].items():
        if name == "tool_calls":
            for call in value:
                _add_call(message.setdefault("tool_calls", []), call)
        elif name == "role":
            message["role"] = value
        else:
            message[name] = (message.get(name) or "") + value
    for name in ("diagnostics", "token_ids"):
        if name in part:
            choice[name] = part[name]
    if part["logprobs"] is not None:
        whole = choice["logprobs"] = choice["logprobs"] or {"content": [], "refusal": None}
        for name in ("content", "reasoning"):
            if name in part["logprobs"]:
                whole[name] = [*whole.get(name, []), *part["logprobs"][name]]
    choice["finish_reason"] = part["finish_reason"]


def _add_call(calls: list[dict[str, Any]], part: dict[str, Any]) -> None:
    number = part["index"]
    if number == len(calls):
        calls.append({key: value for key, value in part.items() if key != "index"})
        return
    for kind in ("function", "custom"):
        for name, text in part.get(kind, {}).items():
            calls[number][kind][name] += text
